"""The benchmark suite: `python -m bench` measures, `bench.report` tabulates, `bench.compare` gates.

How to run and read it: docs/benchmarking.md.
"""
