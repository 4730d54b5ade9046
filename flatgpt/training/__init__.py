"""What train.py is made of besides its loop."""
