"""The base model: find its checkpoint, read it without loading the weights, and check that it can be looped."""
