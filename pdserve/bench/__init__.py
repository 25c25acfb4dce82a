"""Benchmarks: each a module to run with `python -m`, printing JSON with the ratios that matter on a noisy machine."""
