"""Starting everything on one machine: what the processes share is prepared once, then each is kept running."""
