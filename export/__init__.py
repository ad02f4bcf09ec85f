"""From weights to files that run on a device: ONNX, quantized graphs, engines, and runners for them.

Depends on the core, not on recipes or thresholds.
"""
