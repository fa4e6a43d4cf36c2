"""Experiments on whether a generative reward generalises, and whether it trains a policy."""
