"""Weights in 4 or 8 bits: how matrices are quantised, which ones, and the nodes that multiply by them."""
