"""Rewards: their protocol, overlap with references, the learned one, its ratings and validation."""
