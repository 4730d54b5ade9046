"""Tokenizers, the format on disk, and a folder for each dataset with its prepare.py."""
