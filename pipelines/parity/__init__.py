"""`python -m pipelines.parity`: does DALI give the pixels that torchvision gives?"""
