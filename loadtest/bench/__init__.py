"""Benchmarks. Run one with `python -m loadtest.bench.NAME`."""
