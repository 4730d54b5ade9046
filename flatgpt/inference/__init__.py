"""Generation: many texts at once over one KV cache."""
