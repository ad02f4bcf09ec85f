"""Which steps, in which order, with which numbers: composition only, no tensor arithmetic, no ONNX calls."""
