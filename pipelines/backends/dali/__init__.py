"""The back end of NVIDIA DALI."""
