"""The processes of a run: which there are, how they start, and their collectives."""
