"""What tests share: tiny models, independent implementations, doubles of other programs, and comparisons."""
