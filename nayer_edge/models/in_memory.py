"""Teachers that exist only in a Python program: `memory:<class>@<digest>`, found by the digest of their weights.

No file says how such a network is built. The program that has it holds it here while it works; anywhere else, as on the
command line, what needs the network ends with an error that says who can go on.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from nayer_edge.errors import UsageError
from nayer_edge.models.names import MEMORY, ModelName

if TYPE_CHECKING:
    from torch import nn

_held: ContextVar[tuple[str, nn.Module] | None] = ContextVar("held", default=None)

DIGEST_LENGTH = 16
"""hexadecimal digits of the SHA-256 that tell one teacher from another"""


def name_of(network: nn.Module, digest: str) -> str:
    """The name of a network of a program, in a recipe.

    Args:
        digest: of its weights; see `nayer_edge.models.load.weights_digest`.
    """
    kind = re.sub(r"\W", "_", type(network).__name__)
    return f"{MEMORY}:{kind}@{digest[:DIGEST_LENGTH]}"


@contextlib.contextmanager
def holding(name: str, network: nn.Module) -> Iterator[None]:
    """A context in which the network of this name can be built: as copies of `network`."""
    token = _held.set((name, network))
    try:
        yield
    finally:
        _held.reset(token)


def is_held(model: str) -> bool:
    """Whether the network of this name can be built here and now."""
    held = _held.get()
    return held is not None and held[0] == model


def build(model: ModelName) -> nn.Module:
    """A copy of the network that the program holds.

    Raises:
        UsageError: it holds none, or another.
    """
    held = _held.get()
    if held is None or held[0] != model.whole:
        raise not_held(model)
    return copy.deepcopy(held[1])


def not_held(model: ModelName) -> UsageError:
    """The refusal of what needs a network that the program at work does not have."""
    return UsageError(
        f"The teacher {model.whole} is not here: it was an nn.Module of a Python program.",
        why="The run folder holds its weights, and no file says how the network is built.",
        fix="In Python, with the same teacher: nayer_edge.open(RUN, teacher=teacher), or to go on with an unfinished "
        "student: nayer_edge.distill(teacher, …, out=RUN).",
    )
