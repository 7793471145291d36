"""The mathematics of ReST: losses and filters. Arrays in, arrays out; only JAX and NumPy."""
