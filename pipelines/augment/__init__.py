"""Transforms of whole batches on the device, the same in every back end."""
