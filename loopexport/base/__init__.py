"""The base model: find its checkpoint, read it without loading it, and tell whether it can be looped."""
