"""Data-free distillation of image classifiers to compact INT8 models (NAYER), from teacher to gated artefact.

    import nayer_edge as ne

    teacher = ne.Teacher(module, classes=names, input=ne.InputSpec(mean=mean, std=std))
    run = ne.distill(teacher, student="nayer:wrn_16_1", out="runs/mine")
    run.export(int8=True)
    report = run.validate("holdout/")
    verdict = run.gate(max_drop_vs_fp32=0.015)

docs/PYTHON.md goes the whole way. Three folders, one import root, imports pointing one way: `nayer_edge` (what the
method is) ← `nayer_edge.export` (how weights become something that runs) ← `nayer_edge.pipelines` (which steps, in
which order, with which numbers). Beside `__main__`, this is the one module of the core that imports the pipelines: what
it shows of them is imported when it is first used, and torch where it is first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError, TrainingError, UsageError

if TYPE_CHECKING:
    from nayer_edge.pipelines.api import InputSpec, Run, Teacher, distill, load_teacher, open, run

__version__ = "0.1.0"

__all__ = [
    "InputSpec",
    "IntegrityError",
    "MissingError",
    "NayerEdgeError",
    "Run",
    "Teacher",
    "TrainingError",
    "UsageError",
    "__version__",
    "distill",
    "load_teacher",
    "open",
    "run",
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
