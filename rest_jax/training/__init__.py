"""Training: optimisers, state, checkpoints, the one trainer and its log."""
