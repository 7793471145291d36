"""The network: a T5 1.1 encoder-decoder with T5X's parameter tree, its heads, and the mesh it lives on."""
