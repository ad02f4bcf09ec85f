"""Data-free distillation of image classifiers to compact INT8 models (NAYER), from the teacher to a gated artifact.

Three packages under one import root; imports point one way: `nayer_edge` (the method) ← `nayer_edge.export`
(conversion to ONNX, INT8 and device runtimes) ← `nayer_edge.pipelines` (recipes, steps, gate, report, CLI).
"""

__version__ = "0.1.0"
