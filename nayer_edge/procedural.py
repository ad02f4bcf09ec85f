"""Images that need neither data nor a generator: random textures, shapes and strokes, drawn from one random stream.

A round with `synthesis.prior = "procedural"` draws them, then optimises their pixels. It does not depend on the
teacher's normalisation layers. Not part of NAYER: a network can be distilled on crops of one photograph (Asano & Saeed,
ICLR 2023, https://arxiv.org/abs/2112.00725), or on shader images with adversarial steps on their pixels (Frank & Davis,
2023, https://arxiv.org/abs/2310.13782).

Shapes: B images, C channels, H × W pixels, K classes. A family returns values in [0, 1], for any C, H and W.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from nayer_edge import image_priors, losses
from nayer_edge.config import Synthesis
from nayer_edge.memory_bank import to_uint8, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.runtime.distributed import SINGLE, World
from nayer_edge.synthesis import Round
from nayer_edge.training.augment import blend, crop_and_flip

Shape = tuple[int, int, int]
"""(channels, height, width)"""
Family = Callable[[int, Shape, torch.Generator], Tensor]
PIXELS = 2**20
"""of the images that a family draws at once; bounds its memory at large image sizes"""
MIXED = 0.3
"""fraction of the canvases that are mixtures of two"""
SUPPLY = 2
"""canvases per image of a round, from which those are chosen whose predicted classes are rarest"""


def spectrum_noise(count: int, shape: Shape, random: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Gaussian noise with the amplitude spectrum 1/f^a, a ~ U(0.5, 3) per image.

    As in Baradad et al., NeurIPS 2021 (https://arxiv.org/abs/2106.05963, §3.2), isotropic. The channels are
    correlated by a random degree.
    """
    channels, height, width = shape
    device = random.device
    noise = torch.randn(count, channels, height, width, generator=random, device=device)
    common = torch.randn(count, 1, height, width, generator=random, device=device)
    exponent, correlation, contrast, level = _uniform(random, 4, count)
    noise = correlation.sqrt() * common + (1 - correlation).sqrt() * noise
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    columns = torch.fft.rfftfreq(width, device=device)[None]
    # The constant part is divided by the lowest frequency, not by zero.
    frequency = torch.hypot(rows, columns).clamp_min(1 / max(height, width))
    shaped = torch.fft.rfft2(noise) * frequency ** -(0.5 + 2.5 * exponent)
    texture = torch.fft.irfft2(shaped, s=(height, width))
    texture = (texture - texture.mean((1, 2, 3), keepdim=True)) / texture.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return torch.sigmoid(texture * (0.5 + 3 * contrast) + 4 * (level - 0.5))


def coordinate_networks(count: int, shape: Shape, random: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Random networks from a pixel's place to its colour (CPPNs; Stanley 2007, doi:10.1007/s10710-007-9028-8).

    The inputs are x, y and the distance from a random centre; two hidden layers of 16 units, sine and tanh.
    """
    channels, height, width = shape
    hidden, device = 16, random.device
    y, x = _grid(height, width, device)
    place = torch.stack((y, x)).flatten(1).expand(count, 2, height * width)
    centre = _normal(random, count, 2, 1) * 0.5
    place = torch.cat((place, (place - centre).norm(dim=1, keepdim=True)), dim=1)
    zoom, contrast = _uniform(random, 2, count)
    units = torch.baddbmm(
        _normal(random, count, hidden, 1) * 2, _normal(random, count, hidden, 3) * (1 + 5 * zoom[:, :, :, 0]), place
    )
    units = torch.cat((torch.sin(units[:, ::2]), torch.tanh(units[:, 1::2])), dim=1)
    units = torch.baddbmm(_normal(random, count, hidden, 1), _normal(random, count, hidden, hidden) * 0.5, units)
    units = torch.cat((torch.sin(units[:, ::2]), torch.tanh(units[:, 1::2])), dim=1)
    colours = torch.baddbmm(_normal(random, count, channels, 1), _normal(random, count, channels, hidden), units)
    return torch.sigmoid(colours.view(count, channels, height, width) * (0.5 + 2.5 * contrast))


def dead_leaves(count: int, shape: Shape, random: torch.Generator, leaves: int = 24) -> Float[Tensor, "B C H W"]:
    """Ellipses and rectangles of random place, colour and direction that cover each other; sizes r ~ 1/r³.

    The dead leaves model (Lee, Mumford & Huang, IJCV 2001), as in Baradad et al., NeurIPS 2021 (§3.1).
    """
    channels, height, width = shape
    y, x = _grid(height, width, random.device)
    images = torch.rand(count, channels, 1, 1, generator=random, device=random.device).repeat(1, 1, height, width)
    # The number of leaves differs from image to image.
    number = 1 + leaves * _uniform(random, 1, count)[0]
    smallest, largest = 0.2, 1.2
    for leaf in range(leaves):
        top, left, size, ratio, angle, kind = _uniform(random, 6, count)
        # Inverse of the distribution function of p(r) ~ r^-3 between the two sizes.
        radius = (smallest**-2 - size * (smallest**-2 - largest**-2)) ** -0.5
        colour = torch.rand(count, channels, 1, 1, generator=random, device=random.device)
        dy, dx = y - (3 * top - 1.5), x - (3 * left - 1.5)
        cos, sin = torch.cos(math.pi * angle), torch.sin(math.pi * angle)
        along = (cos * dx + sin * dy).abs() / radius
        across = (cos * dy - sin * dx).abs() / (radius * (0.2 + 0.8 * ratio))
        inside = torch.where(kind < 0.5, torch.hypot(along, across), torch.maximum(along, across)) < 1
        images = torch.where(inside & (leaf < number), colour, images)
    return images


def strokes(
    count: int, shape: Shape, random: torch.Generator, most: int = 4, points: int = 12
) -> Float[Tensor, "B C H W"]:
    """One to `most` pen strokes: quadratic Bézier curves of random thickness on a plain background, or inverted.

    Args:
        points: per curve; a pixel's distance from the curve is that from the nearest one.
    """
    channels, height, width = shape
    device = random.device
    y, x = _grid(height, width, device)
    ends = torch.rand(count, most, 3, 2, generator=random, device=device) * 1.8 - 0.9
    thickness, softness, number, connected = _uniform(random, 4, count)
    # A stroke that starts where the last one ended, in half of the images.
    joined = ends.clone()
    joined[:, 1:, 0] = ends[:, :-1, 2]
    ends = torch.where(connected < 0.5, joined, ends)
    t = torch.linspace(0, 1, points, device=device)[:, None]
    curve = (
        (1 - t) ** 2 * ends[:, :, 0, None] + 2 * t * (1 - t) * ends[:, :, 1, None] + t**2 * ends[:, :, 2, None]
    )  # B × strokes × points × 2
    drawn = torch.arange(most, device=device)[:, None] < 1 + most * number[:, :, 0]
    curve = torch.where(drawn[..., None], curve, torch.full_like(curve, 9.0)).flatten(1, 2)
    distance = torch.full((count, 1, height, width), math.inf, device=device)
    for point in curve.unbind(dim=1):
        top, left = point[:, :, None, None, None].unbind(dim=1)
        distance = torch.minimum(distance, torch.hypot(y - top, x - left))
    ink = torch.sigmoid((0.05 + 0.25 * thickness - distance) / (0.02 + 0.1 * softness))
    ground, pen = torch.rand(2, count, channels, 1, 1, generator=random, device=device)
    # In half of the images the ground is black or white, as on paper or a slate.
    plain, white = _uniform(random, 2, count)
    sheet = (white < 0.5).to(ground.dtype).expand_as(ground)
    ground = torch.where(plain < 0.5, sheet, ground)
    pen = torch.where(plain < 0.5, 1 - sheet * 1.0, pen)
    return torch.lerp(ground, pen, ink)


FAMILIES: dict[str, Family] = {
    "spectrum noise": spectrum_noise,
    "coordinate networks": coordinate_networks,
    "dead leaves": dead_leaves,
    "strokes": strokes,
}


def canvases(
    count: int, shape: Shape, random: torch.Generator, families: tuple[str, ...] = tuple(FAMILIES)
) -> Float[Tensor, "B C H W"]:
    """Images of all families in equal parts and random order; `MIXED` of them are mixtures w x + (1 − w) x' of two.

    Args:
        random: generator on the device where the images are wanted; equal streams give equal images.
        families: names from `FAMILIES`.
    """
    each = math.ceil(count / len(families))
    portion = max(1, PIXELS // (shape[1] * shape[2]))
    sizes = [min(portion, each - start) for start in range(0, each, portion)]
    images = torch.cat([FAMILIES[name](size, shape, random) for name in families for size in sizes])
    images = images[torch.randperm(len(images), generator=random, device=random.device)][:count]
    others = images[torch.randperm(count, generator=random, device=random.device)]
    chosen, weights = torch.rand(2, count, generator=random, device=random.device).unbind()
    return blend(images, others, torch.where(chosen < MIXED, weights, 1.0)).clamp(0, 1)


def balanced(classes: Int[Tensor, " N"], count: int) -> Int[Tensor, " count"]:
    """Indices of `count` images whose classes are as balanced as possible: the classes take turns.

    Args:
        classes: the predicted class of each image.
    """
    order = classes.argsort(stable=True)
    grouped = classes[order]
    first = torch.searchsorted(grouped, grouped)
    turn = torch.arange(len(classes), device=classes.device) - first
    return order[turn.argsort(stable=True)[:count]]


def procedural_round(
    teacher: Classifier,
    student: Classifier | None,
    config: Synthesis,
    compute: Compute,
    random: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
    world: World = SINGLE,
) -> Round:
    """One round: canvases with balanced predictions, then `g_steps` steps on their pixels by the losses whose weights
    are not 0; see `ascend`. Without any, no steps.

    The labels are the teacher's final predictions. Of the losses, L_bn is NaN, and L_ce is that of the labels.

    Args:
        teacher: in eval mode, frozen.
        student: in eval mode; None during warm-up.
        random: generator on the device, equal on every rank: each draws for the whole batch and uses its share.
        on_step: called `g_steps` times.
        world: ranks that make equal shares of the batch.
    """
    images = world.share(canvases(SUPPLY * config.batch, teacher.spec.shape, random))
    predicted = _answers(teacher, images, compute).argmax(dim=1)
    chosen = balanced(predicted, config.batch // world.size)
    images, first = images[chosen], predicted[chosen]
    loss_adv = torch.zeros((), device=images.device)
    adversary = student if config.lambda_adv > 0 else None
    own = (config.lambda_ce, *image_priors.weights(config))
    for _ in range(config.g_steps):
        if adversary is not None or any(own):
            images, loss_adv = ascend(images, first, teacher, adversary, config, compute, random, world)
        on_step()
    kept = to_uint8(images)
    logits = _answers(teacher, to_unit(kept), compute)
    labels = logits.argmax(dim=1)
    loss_ce = losses.class_loss(logits, labels)
    parts = world.mean(torch.stack((loss_ce, loss_adv)))
    return Round(kept, labels, F.pad(parts, (1, 0), value=math.nan))


def ascend(
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    teacher: Classifier,
    student: Classifier | None,
    config: Synthesis,
    compute: Compute,
    random: torch.Generator,
    world: World = SINGLE,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, ""]]:
    """One step on the pixels: against the gradient of −λ_adv · KL(T‖S) + λ_ce · L_ce + λ_tv · TV + λ_act · L_a
    + λ_patch · L_PSE, normalised per image to the root mean square `pixel_step`, and clipped to [0, 1]. Without a
    student, there is no KL. Returns the images and −KL before the step."""
    images = images.detach().requires_grad_()
    with compute.autocast(), image_priors.watching(teacher) as watched:
        seen = crop_and_flip(images, config.augment, random, world)
        teacher_logits = teacher(seen)
    loss = config.lambda_ce * losses.class_loss(teacher_logits, labels)
    loss_adv = torch.zeros_like(loss)
    if student is not None:
        with compute.autocast():
            student_logits = student(seen)
        loss_adv = -losses.distillation_loss(student_logits, teacher_logits, temperature=1.0)
        loss = loss + config.lambda_adv * loss_adv
    loss = loss + image_priors.weighted_loss(images, watched, config)
    (gradient,) = torch.autograd.grad(loss, images)
    size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    moved = (images - config.pixel_step * gradient / size).clamp(0, 1)
    return moved.detach(), loss_adv.detach()


def draw_procedural(
    teacher: Classifier,
    config: Synthesis,
    compute: Compute,
    random: Callable[[int], torch.Generator],
    count: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[UInt8[Tensor, "N C H W"], Int[Tensor, " N"]]:
    """New images, for calibration or as a synthetic hold-out: whole rounds without a student, the last one cut off.

    Args:
        random: returns the random generator of round i; different streams give different images.
    """
    rounds = [
        procedural_round(teacher, None, config, compute, random(number), on_step)
        for number in range(math.ceil(count / config.batch))
    ]
    images, labels = torch.cat([made.images for made in rounds]), torch.cat([made.labels for made in rounds])
    return images[:count], labels[:count]


@torch.no_grad()
def _answers(teacher: Classifier, images: Float[Tensor, "B C H W"], compute: Compute) -> Float[Tensor, "B K"]:
    with compute.autocast():
        return torch.cat([teacher(part) for part in images.split(256)]).float()


def _uniform(random: torch.Generator, values: int, count: int) -> tuple[Tensor, ...]:
    """Values from U(0, 1) per image, each B × 1 × 1 × 1."""
    return torch.rand(values, count, 1, 1, 1, generator=random, device=random.device).unbind()


def _normal(random: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=random, device=random.device)


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns in [−1, 1] along the longer side, as H × W."""
    longer = max(height, width)
    y = (2 * torch.arange(height, device=device) + 1 - height) / longer
    x = (2 * torch.arange(width, device=device) + 1 - width) / longer
    return y[:, None].expand(height, width), x[None].expand(height, width)
