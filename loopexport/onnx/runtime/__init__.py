"""Run an ONNX export with ONNX Runtime: prompts, the cache and sampling."""
