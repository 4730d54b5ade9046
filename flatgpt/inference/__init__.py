"""Batched generation over one KV cache."""
