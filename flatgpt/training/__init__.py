"""The parts of train.py outside its loop."""
