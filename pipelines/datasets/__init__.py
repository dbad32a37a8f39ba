"""Which images there are: folders, shards, copies, and the check of every file."""
