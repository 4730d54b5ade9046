"""Between api.py and its clients."""
