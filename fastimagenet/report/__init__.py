"""Read what a finished or stopped run has left, and report it."""
