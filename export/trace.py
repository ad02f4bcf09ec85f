"""Prepares a PyTorch network for export: copies it, checks what it takes and returns, traces it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nayer_edge.errors import UsageError, first_line


def copy_for_export(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode, that was run on images of this shape (C, H, W).

    Raises:
        UsageError: the model cannot be copied, does not take such images, or does not return (batch, classes).
    """
    try:
        network = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UsageError("The model cannot be copied, so it cannot be exported.", why=f"{error}") from error
    network = network.cpu().float().eval().requires_grad_(False)
    # Channels-last weights would enter a graph with a transpose.
    network = network.to(memory_format=torch.contiguous_format)
    try:
        with torch.no_grad():
            logits = network(torch.full((2, *shape), 0.5))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"The model does not take images of shape {shape}.",
            why=first_line(error),
            fix="Set the input specification (channels, height, width) to what the model was trained on.",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(
            "The model does not return logits of shape (batch, classes).",
            why=f"For two images it returned {found}.",
            fix="Wrap it so that forward(images) returns one tensor of logits.",
        )
    return network


def traced(network: nn.Module, images: torch.Tensor, batch: str | None = None) -> torch.export.ExportedProgram:
    """Traces a network by torch.export.

    Args:
        images: an example; more than one image where the batch is dynamic.
        batch: name of the dynamic batch dimension; None: the batch is fixed to that of the example.

    Raises:
        UsageError: the model cannot be traced, or fixes its batch size although it is to be dynamic.
    """
    dynamic = None if batch is None else ({0: torch.export.Dim(batch)},)
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        if batch is not None and ("Constraints violated" in str(error) or "specialized" in str(error)):
            raise fixed_batch() from error
        raise UsageError(
            "The model cannot be traced by torch.export.",
            why=first_line(error),
            fix="Remove Python branches that depend on the values of images.",
        ) from error


def fixed_batch() -> UsageError:
    """The error for a model whose code uses a constant instead of the number of images."""
    return UsageError(
        "The model fixes its batch size.",
        why="Its code uses a constant instead of the number of images, so the export has no dynamic batch.",
        fix="In its forward method, write x.flatten(1) or x.reshape(x.shape[0], -1).",
    )
