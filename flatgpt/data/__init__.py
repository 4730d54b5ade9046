"""Tokenizers, datasets on disk, batches by number, and text made into them."""
