"""The jobs of bench.py, and the baselines it compares with."""
