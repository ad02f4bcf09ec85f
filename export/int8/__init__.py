"""Quantization of an ONNX graph: activation ranges, Q/DQ nodes, errors per layer, and what then runs in INT8."""
