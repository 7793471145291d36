"""Decoding: sampling, greedy and beam search, the scorer, and the translator that drives them."""
