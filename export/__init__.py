"""How weights become something that runs: ONNX, quantized graphs, engines, runners.

Knows the core; knows no recipe and no threshold.
"""
