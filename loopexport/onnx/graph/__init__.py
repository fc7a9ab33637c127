"""Turn a trace into an ONNX graph: unroll the loop, bind the stored weights, write the config of onnxruntime-genai."""
