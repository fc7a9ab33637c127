"""The weights that graphs are made of: plain tensors, and matrices in 4 or 8 bits that a checkpoint stores."""
