"""Data-free distillation of image classifiers to compact INT8 models (NAYER), from teacher to gated artefact.

Three folders, one import root, imports pointing one way: `nayer_edge` (what the method is) ←
`nayer_edge.export` (how weights become something that runs) ← `nayer_edge.pipelines` (which steps,
in which order, with which numbers).
"""

__version__ = "0.1.0"
