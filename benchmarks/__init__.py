"""Benchmarks: `python -m benchmarks.NAME`; each writes its table to docs/benchmarks/."""
