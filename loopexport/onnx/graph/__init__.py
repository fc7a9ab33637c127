"""Make an ONNX graph of a trace: unroll the loop, bind the stored weights, describe it to other runtimes."""
