"""The training loop and what it needs at every step."""
