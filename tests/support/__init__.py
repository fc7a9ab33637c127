"""Helpers that tests share: tiny models, independent implementations, doubles of other programs, comparisons."""
