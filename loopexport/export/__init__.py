"""The exported directory: what is in it, how `convert` writes it, and how `restore` gives the base back."""
