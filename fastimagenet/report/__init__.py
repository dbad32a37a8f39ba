"""What a finished or stopped run left, read back from its files."""
