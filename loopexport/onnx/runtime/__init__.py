"""Run an ONNX export with ONNX Runtime: prompts, the cache, and how the next token is chosen."""
