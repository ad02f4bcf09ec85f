"""Teachers that exist only in a Python program: `memory:<class>@<digest>`, identified by the digest of their weights.

No file describes the architecture of such a network. The program that owns it registers it here while it works.
Elsewhere, for example on the command line, operations that need the network fail with an error that says how to go on.
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
"""hexadecimal digits of the SHA-256 in a teacher's name"""


def name_of(network: nn.Module, digest: str) -> str:
    """The name of an in-memory network in recipes.

    Args:
        digest: of its weights; see `nayer_edge.models.load.weights_digest`.
    """
    kind = re.sub(r"\W", "_", type(network).__name__)
    return f"{MEMORY}:{kind}@{digest[:DIGEST_LENGTH]}"


@contextlib.contextmanager
def holding(name: str, network: nn.Module) -> Iterator[None]:
    """A context in which `build` returns copies of `network` for this name."""
    token = _held.set((name, network))
    try:
        yield
    finally:
        _held.reset(token)


def is_held(model: str) -> bool:
    """Whether `build` can currently provide the network of this name."""
    held = _held.get()
    return held is not None and held[0] == model


def build(model: ModelName) -> nn.Module:
    """A copy of the registered network.

    Raises:
        UsageError: no network, or another one, is registered.
    """
    held = _held.get()
    if held is None or held[0] != model.whole:
        raise not_held(model)
    return copy.deepcopy(held[1])


def not_held(model: ModelName) -> UsageError:
    """The error for an operation that needs a network which is not registered."""
    return UsageError(
        f"The teacher {model.whole} is not available: it was an nn.Module in a Python program.",
        why="The run folder contains its weights, but not the code that builds the network.",
        fix="In Python, with the same teacher: run = nayer_edge.open(RUN, teacher=teacher). To train the student "
        'longer: nayer_edge.run(run, more="1h"). To continue an unfinished one: nayer_edge.run(run).',
    )
