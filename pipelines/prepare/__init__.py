"""`python -m pipelines.prepare`: from what a user has to image folders that train fast."""
