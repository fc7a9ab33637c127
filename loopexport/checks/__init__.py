"""`verify`: compare what an export computes with what its loop should compute, in transformers and in vLLM."""
