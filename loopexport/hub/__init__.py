"""Publish an export on the Hugging Face Hub: what may leave, how each file travels, and the one commit."""
