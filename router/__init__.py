"""Front door and brain: HTTP, tokeniser, policy, prefix index, fleet. Imports neither torch nor UCX."""
