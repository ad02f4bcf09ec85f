"""Data-free distillation of image classifiers to compact INT8 models (NAYER), from the teacher to a gated artifact.

    import nayer_edge as ne

    teacher = ne.Teacher(module, classes=names, input=ne.InputSpec(mean=mean, std=std))
    run = ne.distill(teacher, student="nayer:wrn_16_1", out="runs/mine")
    run.export(int8=True)
    report = run.validate("holdout/")
    verdict = run.gate(max_drop_vs_fp32=0.015)

docs/PYTHON.md walks through a complete example. Three packages under one import root; imports point one way:
`nayer_edge` (the method) ← `nayer_edge.export` (conversion to ONNX, INT8 and device runtimes) ← `nayer_edge.pipelines`
(recipes, steps, gate, report, CLI). This module and `__main__` are the only ones of the core that import the pipelines.
They do so on first use, so `import nayer_edge` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError, TrainingError, UsageError

if TYPE_CHECKING:
    from nayer_edge.pipelines.api import (
        InputSpec,
        Recipe,
        Report,
        Run,
        Sweep,
        Teacher,
        Verdict,
        distill,
        load_teacher,
        open,
        run,
        sweep,
    )

__version__ = "0.1.0"

__all__ = [
    "InputSpec",
    "IntegrityError",
    "MissingError",
    "NayerEdgeError",
    "Recipe",
    "Report",
    "Run",
    "Sweep",
    "Teacher",
    "TrainingError",
    "UsageError",
    "Verdict",
    "__version__",
    "distill",
    "load_teacher",
    "open",
    "run",
    "sweep",
]


if not TYPE_CHECKING:
    # Type checkers see the names above, and no others.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'nayer_edge' has no attribute '{name}'")
        from nayer_edge.pipelines import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
