"""Text on both sides of the engine, which knows tokens only: tokeniser, chat template, detokeniser, stop strings."""
