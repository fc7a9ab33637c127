"""The loop: its spec, its cost, published results, advice before a conversion, and its description in words."""
