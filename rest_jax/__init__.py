"""rest_jax: Reinforced Self-Training (ReST, arXiv:2308.08998) for machine translation in JAX."""

__version__ = "0.1.0"
