"""How weights become something that runs: ONNX, quantized graphs, engines, runners. Knows the core, no recipe, no threshold."""
