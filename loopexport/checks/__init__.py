"""`verify`: compare what an export computes with what its loop promises, in transformers and in vLLM."""
