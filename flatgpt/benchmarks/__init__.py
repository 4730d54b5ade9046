"""The benchmarks of bench.py, and the baselines that it compares with."""
