"""Whether images can be made for a teacher: the statistics or the input size that `synthesis.prior` needs."""

from __future__ import annotations

from torch import Tensor, nn

from nayer_edge.errors import UsageError, no_batch_norms
from nayer_edge.models.classifier import Classifier

MOST_PIXELS = 32
"""longer side of the largest images at which a prior for teachers without BatchNorm was measured"""
EXPECTED = (
    "On digits of 16 pixels, ResNet-8 students reached 98.8 % (teacher with GroupNorm, 99.2 %), "
    "98.6 % (ConvNeXt, 99.2 %) and 96.7 % (ViT, 98.8 %). On CIFAR-10 (32 pixels), a short run reached 62.7 % "
    "(GroupNorm, 86.8 %)."
)
"""what was measured (benchmarks/results/without_batchnorm.generator.json and .cifar10.json), for people"""


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every BatchNorm with running statistics, in the order of `model.modules()`.

    Frozen BatchNorms, which libraries define anew with buffers in place of parameters (torchvision's and timm's),
    are among them: their statistics have the same meaning.
    """
    return [module for module in model.modules() if _has_statistics(module)]


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # Its variances are means over images, without what images differ by.
        return False
    held = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return all(isinstance(value, Tensor) and value.ndim == 1 for value in held)


def require_prior(network: Classifier, what: str, prior: str) -> None:
    """Raises an error for a teacher for which `synthesis.prior` cannot make images.

    Args:
        what: the network's name in the error message, e.g. "The teacher".

    Raises:
        UsageError: no BatchNorm with running statistics for the prior "batchnorm"; for any other, BatchNorm without
            them, which makes an answer depend on the other images of the batch, or position embeddings for images of
            another size, which some transformers would interpolate silently.
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
        _require_patches(module, what, height, width)


def _require_patches(module: nn.Module, what: str, height: int, width: int) -> None:
    """Checks the patch embedding of a transformer: timm's has `img_size`, that of torchvision and transformers
    `image_size`. Some of them interpolate position embeddings, or leave out pixels, without an error."""
    patch = _pair(getattr(module, "patch_size", None))
    if patch is None:
        return
    key = "img_size" if hasattr(module, "img_size") else "image_size"
    size = _pair(getattr(module, key, None))
    if size is not None and size != (height, width):
        built = f"; or build it for this size: teacher.arguments = {{ {key} = {height} }}" if height == width else ""
        raise UsageError(
            f"{what} was built for images of {size[0]}×{size[1]}, and it gets images of {height}×{width}.",
            why="Its position embeddings would be interpolated, and it was not trained with them.",
            fix=f"Correct teacher.input; or let it resize its images: teacher.resize = [{size[0]}, {size[1]}]{built}",
        )
    if height % patch[0] or width % patch[1]:
        down, across = (max(side // part, 1) * part for side, part in zip((height, width), patch, strict=True))
        raise UsageError(
            f"{what} has patches of {patch[0]}×{patch[1]}, which do not divide images of {height}×{width}.",
            why="Pixels at the edge would be left out.",
            fix=f"Correct teacher.input; or let it resize its images: teacher.resize = [{down}, {across}]",
        )


def _pair(value: object) -> tuple[int, int] | None:
    """A size as (height, width); None if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None


def require_batch_norms(network: nn.Module, what: str) -> None:
    """Raises an error for a network without BatchNorm statistics that synthesis can match.

    Args:
        what: the network's name in the error message, e.g. "The teacher".

    Raises:
        UsageError: it has no BatchNorm with running statistics.
    """
    if not batch_norms(network):
        raise no_batch_norms(what)
