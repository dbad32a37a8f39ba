"""The processes of a run: who they are, how they start, what they exchange."""
