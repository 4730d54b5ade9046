"""What bench.py times, and what it times it beside."""
