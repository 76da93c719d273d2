"""rlprior: which next-token objective leaves the best starting point for reinforcement learning?"""

__version__ = "0.1.0"
