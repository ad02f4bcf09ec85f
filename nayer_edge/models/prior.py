"""Whether images can be made for a teacher: the statistics or the input size that `synthesis.prior` needs."""

from __future__ import annotations

from torch import nn

from nayer_edge.errors import UsageError, no_batch_norms
from nayer_edge.models.classifier import Classifier


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm with running statistics, in the order of `model.modules()`."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def require_prior(network: Classifier, what: str, prior: str) -> None:
    """Raises an error for a teacher for which `synthesis.prior` cannot make images.

    Args:
        what: the network's name in the error message, e.g. "The teacher".

    Raises:
        UsageError: no BatchNorm with running statistics for the prior "batchnorm"; for any other, BatchNorm without
            them, which makes an answer depend on the other images of the batch, or position embeddings for images of
            another size, which some transformers would interpolate without a word.
    """
    if prior == "batchnorm":
        require_batch_norms(network, what)
        return
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None]
    if norms:
        raise UsageError(
            f"{what} has {len(norms)} BatchNorm layers without running statistics (track_running_stats=False).",
            why="They use the statistics of the current batch, so the output for an image depends on the other images.",
            fix="Use a teacher with running statistics.",
        )
    height, width = network.resize or network.spec.shape[1:]
    for module in network.modules():
        # timm's patch embeddings; those of torchvision and transformers refuse other sizes themselves.
        size = getattr(module, "img_size", None) if hasattr(module, "patch_size") else None
        if isinstance(size, tuple) and size != (height, width):
            raise UsageError(
                f"{what} was built for images of {size[0]}×{size[1]}, and it gets images of {height}×{width}.",
                why="Its position embeddings would be interpolated, and it was not trained with them.",
                fix=f"Correct teacher.input; or let it resize its images: teacher.resize = [{size[0]}, {size[1]}]; or "
                f"build it for this size: teacher.arguments = {{ img_size = {height} }}",
            )


def require_batch_norms(network: nn.Module, what: str) -> None:
    """Raises an error for a network without BatchNorm statistics that synthesis can match.

    Args:
        what: the network's name in the error message, e.g. "The teacher".

    Raises:
        UsageError: it has no BatchNorm with running statistics.
    """
    if not batch_norms(network):
        raise no_batch_norms(what)
