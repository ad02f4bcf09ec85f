"""A synthesis round in float32 against reference.py, with the same random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from nayer_edge import generator as generators
from nayer_edge import losses
from nayer_edge.batchnorm import BatchNormStatistics
from nayer_edge.config import Augment, Synthesis
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.distillation import Settings
from nayer_edge.errors import UsageError
from nayer_edge.generator import Generator, NoisyLinear, balanced_labels
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.memory_bank import to_uint8
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.prior import batch_norms
from nayer_edge.runtime.compute import Compute, choose
from nayer_edge.synthesis import Round, draw_images, synthesize_round
from nayer_edge.training.augment import crop_and_flip

Stream = Callable[[int], torch.Generator]
# Both compute in float32, but sum in different orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Bench:
    """Our generator and the reference's with the same weights, and the other inputs of a round."""

    def __init__(self, reference: ModuleType, embeddings: Tensor, teacher: Classifier, config: Synthesis) -> None:
        widths = GeneratorConfig(noisy_dim=10, channels=4)
        classes, dimensions = embeddings.shape
        self.reference, self.embeddings, self.teacher, self.config = reference, embeddings, teacher, config
        self.ours = Generator(dimensions, classes, config.batch, teacher.spec.shape, widths)
        generators.initialise(self.ours, torch.Generator().manual_seed(11))
        batch = min(classes, config.batch)
        self.theirs = reference.ReferenceGenerator(dimensions, batch, config.batch, teacher.spec.shape, 10, 4)
        reference.take_over(self.theirs, self.ours)
        self.statistics = BatchNormStatistics(teacher, config.bn_momentum)
        self.memory: list[tuple[Tensor, Tensor]] | None = None

    def round(self, seed: int, compute: Compute, student: Classifier | None = None) -> Round:
        """Our round."""
        random = torch.Generator().manual_seed(seed)
        return synthesize_round(
            self.ours, self.embeddings, self.teacher, student, self.statistics, self.config, compute, random
        )

    def reference_round(self, seed: int, student: Classifier | None = None) -> Any:
        """The reference's, with the same draws."""
        random = torch.Generator().manual_seed(seed)
        made = self.reference.synthesis_round(
            self.theirs, self.embeddings, self.teacher, student, self.memory, self.config, random
        )
        self.memory = made.memory
        return made


@pytest.fixture
def bench(
    reference: ModuleType, label_embeddings: LabelEmbeddings, teacher: Classifier, settings: Callable[..., Settings]
) -> Callable[..., Bench]:
    """`bench(g_steps=5)`: both generators side by side; `classes=9` uses more labels than the teacher has classes."""

    def make(*, on: Classifier = teacher, embeddings: Tensor = label_embeddings.embeddings, **changes: object) -> Bench:
        config = settings(**{f"synthesis_{key}": value for key, value in changes.items()}).synthesis
        return Bench(reference, embeddings, on, config)

    return make


def assert_same_generator(bench: Bench) -> None:
    """Compares images and noisy weights. Biases before a BatchNorm are not compared: their gradients are rounding
    errors, which Adam turns into full steps."""
    labels = torch.arange(bench.config.batch) % len(bench.embeddings)
    inputs = bench.embeddings[labels]
    torch.testing.assert_close(bench.ours(inputs), bench.theirs(inputs), rtol=1e-4, atol=1e-5)
    for index, linear in enumerate(bench.theirs.noisy):
        torch.testing.assert_close(bench.ours.noisy.weight[index], linear.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bench.ours.noisy.bias[index, 0], linear.bias, rtol=1e-4, atol=1e-5)


def almost_all_equal(ours: Tensor, wanted: Tensor) -> bool:
    """Bytes may differ by one level where a value is at a rounding boundary."""
    apart = (ours.int() - wanted.int()).abs()
    return int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01


# ------------------------------------------------------------------ losses


def test_each_loss_equals_the_reference(
    reference: ModuleType, teacher: Classifier, student: Classifier, stream: Stream
) -> None:
    images = torch.rand(12, 2, 8, 8, generator=stream(0))
    labels = torch.arange(12) % 3
    statistics = BatchNormStatistics(teacher, 0.9)
    with torch.no_grad(), statistics.watch():
        logits = teacher(images)
    with torch.no_grad():
        answers = student(images)
        wanted_logits, now, layers = reference.teacher_with_statistics(teacher, images)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=0)
    wanted_bn = reference.batchnorm_loss(now, layers, None, 0.9)
    torch.testing.assert_close(statistics.loss(), wanted_bn, rtol=1e-5, atol=1e-5)
    wanted_ce = -torch.log_softmax(logits, 1)[range(12), labels].mean()
    torch.testing.assert_close(losses.class_loss(logits, labels), wanted_ce, rtol=1e-6, atol=1e-6)
    agree = logits.argmax(1) == answers.argmax(1)
    assert 0 < int(agree.sum()) < 12
    wanted_adv = -(agree * reference.kl(logits, answers)).mean()
    torch.testing.assert_close(losses.adversarial_loss(logits, answers), wanted_adv, rtol=1e-4, atol=1e-6)
    wanted_kd = 16 * reference.kl(logits, answers, 4.0).mean()
    torch.testing.assert_close(losses.distillation_loss(answers, logits, 4.0), wanted_kd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (4, True)])
def test_augmentation_equals_the_reference_with_the_same_draws(
    reference: ModuleType, stream: Stream, pad: int, flip: bool
) -> None:
    images = torch.rand(40, 2, 8, 6, generator=stream(1))
    ours = crop_and_flip(images, Augment(pad=pad, flip=flip), stream(2))
    torch.testing.assert_close(ours, reference.crop_and_flip(images, pad, flip, stream(2)), rtol=0, atol=0)


def test_all_batchnorms_are_matched_in_whatever_order_they_are_called(stream: Stream) -> None:
    class Nested(nn.Module):
        """Registers its layers in another order than it calls them, nests one, and never calls another."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.BatchNorm2d(2)
            self.unused = nn.BatchNorm2d(5)
            self.inner = nn.Sequential(nn.Sequential(nn.BatchNorm2d(2)), nn.ReLU())
            self.untracked = nn.BatchNorm2d(2, track_running_stats=False)
            self.first = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.untracked(self.first(x) * 2)) + 3)

    network = Nested().eval()
    with torch.no_grad():
        for number, norm in enumerate(batch_norms(network)):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.fill_(number)
            norm.running_var.fill_(number + 1)
    assert len(batch_norms(network)) == 4
    images = torch.rand(6, 2, 4, 4, generator=stream(0))
    inputs: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _module, seen, _out, name=name: inputs.__setitem__(name, seen[0]))
    statistics = BatchNormStatistics(network, 0.5)
    with statistics.watch():
        network(images)
    wanted = torch.zeros(())
    for name in ("last", "inner.0.0", "first"):
        norm = network.get_submodule(name)
        wanted += (inputs[name].mean([0, 2, 3]) - norm.running_mean).norm()
        wanted += (inputs[name].var([0, 2, 3], correction=0) - norm.running_var).norm()
    torch.testing.assert_close(statistics.loss(), wanted)
    statistics.remember()
    assert statistics.memory is not None
    assert len(statistics.memory) == 3
    torch.testing.assert_close(statistics.loss(), wanted)  # the memory equals the last statistics
    for module in network.modules():
        assert not module._forward_pre_hooks


def test_as_many_statistics_as_batchnorms(teacher: Classifier) -> None:
    statistics = BatchNormStatistics(teacher, 0.9)
    with torch.no_grad(), statistics.watch():
        teacher(torch.rand(4, 2, 8, 8))
    statistics.remember()
    assert statistics.memory is not None
    assert len(statistics.memory) == len(batch_norms(teacher)) == 4
    assert [len(mean) for mean, _ in statistics.memory] == [len(norm.running_mean) for norm in batch_norms(teacher)]


def test_an_unused_batchnorm_is_skipped(stream: Stream) -> None:
    """Such as in auxiliary heads of a user's teacher, which are used only in training."""

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x)
            return (self.head(features) if self.training else features).mean((2, 3))

    network = WithHead().eval()
    statistics = BatchNormStatistics(network, 0.9)
    with torch.no_grad(), statistics.watch():
        network(torch.rand(2, 3, 8, 8, generator=stream(0)))
    assert bool(torch.isfinite(statistics.loss()))
    statistics.remember()
    assert statistics.memory is not None
    assert len(statistics.memory) == len(batch_norms(network)) - 1


def test_frozen_batchnorms_are_batchnorms(stream: Stream) -> None:
    """Libraries freeze a network by replacing its BatchNorms by modules of their own; no statistic changes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    network.train()(torch.rand(8, 3, 8, 8, generator=stream(0)))
    network.eval()
    by_timm = pytest.importorskip("timm.layers").freeze_batch_norm_2d(copy.deepcopy(network))
    by_torchvision = copy.deepcopy(network)
    for place in (1, 4):
        frozen = FrozenBatchNorm2d(network[place].num_features)
        frozen.load_state_dict(network[place].state_dict())
        by_torchvision[place] = frozen
    images, found = torch.rand(6, 3, 8, 8, generator=stream(1)), []
    for each in (network, by_timm, by_torchvision):
        statistics = BatchNormStatistics(each, 0.9)
        with torch.no_grad(), statistics.watch():
            each(images)
        found.append(statistics.loss())
    assert not any(isinstance(module, nn.BatchNorm2d) for each in (by_timm, by_torchvision) for module in each)
    assert float(found[0]) > 0.01
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_statistics_of_single_images_are_not_those_of_a_batch() -> None:
    tracked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.raises(UsageError, match="no BatchNorm layers"):
        BatchNormStatistics(tracked, 0.9)


def test_a_teacher_without_batchnorm_is_refused() -> None:
    with pytest.raises(UsageError, match="no BatchNorm layers") as caught:
        BatchNormStatistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), 0.9)
    assert "ConvNeXt" in caught.value.why


def test_with_memory_the_gradient_is_scaled_by_one_minus_momentum(teacher: Classifier, stream: Stream) -> None:
    images = torch.rand(8, 2, 8, 8, generator=stream(0), requires_grad=True)

    def gradient(statistics: BatchNormStatistics) -> Tensor:
        with statistics.watch():
            teacher(images)
        (found,) = torch.autograd.grad(statistics.loss(), images)
        return found

    statistics = BatchNormStatistics(teacher, 0.9)
    alone = gradient(statistics)
    statistics.remember()  # of the same images, so that the residual is the same and only its gradient changes
    assert float(alone.abs().max()) > 0
    torch.testing.assert_close(gradient(statistics), 0.1 * alone, rtol=1e-3, atol=1e-7)
    statistics.momentum = 0.0
    torch.testing.assert_close(gradient(statistics), alone, rtol=0, atol=0)


# ------------------------------------------------------------------ a whole round


@pytest.mark.parametrize(("batch", "classes"), [(9, 3), (8, 3), (2, 3), (3, 3), (7, 2)])
@pytest.mark.parametrize("adversarial", [False, True])
def test_a_round_equals_the_reference(
    bench: Callable[..., Bench],
    compute: Compute,
    student: Classifier,
    label_embeddings: LabelEmbeddings,
    batch: int,
    classes: int,
    adversarial: bool,
) -> None:
    both = bench(batch=batch, g_steps=6, embeddings=label_embeddings.embeddings[:classes])
    against = student if adversarial else None
    ours = both.round(5, compute, against)
    wanted = both.reference_round(5, against)
    assert ours.labels.tolist() == wanted.labels.tolist()
    best = wanted.steps[wanted.best]
    torch.testing.assert_close(ours.losses, torch.tensor([best.bn, best.ce, best.adv]), **CLOSE)
    assert ours.images.dtype == torch.uint8
    assert almost_all_equal(ours.images, wanted.images)
    assert_same_generator(both)


def test_batchnorm_momentum_over_rounds(bench: Callable[..., Bench], compute: Compute) -> None:
    both = bench(bn_momentum=0.7)
    for seed in range(4):
        ours, wanted = both.round(seed, compute), both.reference_round(seed)
        assert both.statistics.memory is not None
        assert both.memory is not None
        for mine, theirs in zip(both.statistics.memory, both.memory, strict=True):
            torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-5)
        best = wanted.steps[wanted.best]
        torch.testing.assert_close(ours.losses[:2], torch.tensor([best.bn, best.ce]), rtol=1e-4, atol=1e-5)
        assert almost_all_equal(ours.images, wanted.images)


def test_the_step_with_the_lowest_loss_is_kept_as_it_was_before_augmentation(
    bench: Callable[..., Bench], compute: Compute
) -> None:
    both = bench(lr=0.05, g_steps=12, augment=Augment(pad=4, flip=True))
    seed = 8
    ours, wanted = both.round(seed, compute), both.reference_round(seed)
    totals = [step.loss for step in wanted.steps]
    assert 0 < wanted.best < len(totals) - 1, "this seed proves nothing: the best step is the first or the last"
    assert totals.index(min(totals)) == wanted.best
    assert almost_all_equal(ours.images, to_uint8(wanted.steps[wanted.best].images))
    for number, step in enumerate(wanted.steps):
        if number != wanted.best:
            assert not almost_all_equal(ours.images, to_uint8(step.images))
    weighted = both.config.lambda_bn * ours.losses[0] + both.config.lambda_ce * ours.losses[1]
    assert float(weighted) == pytest.approx(min(totals), rel=1e-4)


def test_a_loss_that_is_never_finite_is_not_hidden(bench: Callable[..., Bench], compute: Compute) -> None:
    both = bench()
    with torch.no_grad():
        both.ours.project.weight.fill_(torch.nan)
    assert not bool(torch.isfinite(both.round(0, compute).losses).any())


@pytest.mark.parametrize(("count", "classes"), [(9, 3), (8, 3), (400, 10), (100, 7)])
def test_labels_are_balanced(count: int, classes: int, stream: Stream) -> None:
    labels = balanced_labels(count, classes, stream(0))
    times = torch.bincount(labels, minlength=classes)
    assert int(times.max()) - int(times.min()) <= 1
    # Each group of the noisy layer sees every class at most once.
    for start in range(0, count, classes):
        group = labels[start : start + classes].tolist()
        assert len(set(group)) == len(group)


def test_fewer_images_than_classes_get_distinct_labels_that_change(stream: Stream) -> None:
    drawn = [balanced_labels(20, 1000, stream(seed)).tolist() for seed in range(50)]
    assert all(len(set(labels)) == 20 for labels in drawn)
    assert len({label for labels in drawn for label in labels}) > 500


# ------------------------------------------------------------------ the noisy layer


def test_grouped_noisy_layer_is_a_list_of_linears(stream: Stream) -> None:
    grouped = NoisyLinear(3, 6, 10)
    grouped.redraw(stream(0))
    with torch.no_grad():
        grouped.bias.normal_(generator=stream(1))
    x = torch.randn(3, 4, 6, generator=stream(2))
    for index in range(3):
        linear = nn.Linear(6, 10)
        with torch.no_grad():
            linear.weight.copy_(grouped.weight[index].T)
            linear.bias.copy_(grouped.bias[index, 0])
        torch.testing.assert_close(grouped(x)[index], linear(x[index]))


def test_the_noisy_layer_is_standard_normal_with_zero_bias(stream: Stream) -> None:
    layer = NoisyLinear(4, 64, 80)
    layer.redraw(stream(0))
    # Kolmogorov–Smirnov test at α = 0.01; the seed is fixed, so this is deterministic.
    assert stats.kstest(layer.weight.detach().flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(layer.weight.detach().flatten().numpy() * 1.1, "norm").pvalue < 0.01
    assert bool((layer.bias == 0).all())


def test_it_is_redrawn_each_round_and_trained_during_it(bench: Callable[..., Bench], compute: Compute) -> None:
    both = bench()
    seen = []
    for seed in (0, 1):
        both.round(seed, compute)
        drawn = copy.deepcopy(both.ours.noisy)
        drawn.redraw(torch.Generator().manual_seed(seed))
        moved = (both.ours.noisy.weight - drawn.weight).detach().abs()
        # Adam moves a weight by little more than lr per step: the layer is trained, and starts from its own draw.
        assert 0.5 * both.config.lr < float(moved.mean())
        assert float(moved.max()) < 2 * both.config.lr * both.config.g_steps
        assert float(both.ours.noisy.bias.detach().abs().max()) > 0
        seen.append(both.ours.noisy.weight.detach().flatten().clone())
    correlation = float(torch.corrcoef(torch.stack(seen))[0, 1])
    assert abs(correlation) < 4 / len(seen[0]) ** 0.5
    assert not torch.equal(seen[0], seen[1])


def test_adam_is_fresh_every_round(bench: Callable[..., Bench], compute: Compute) -> None:
    """The first step of a new Adam moves every weight by lr, regardless of earlier rounds."""
    both = bench(g_steps=1, lr=1e-3)
    both.round(0, compute)
    before = both.ours.body[-1].weight.detach().clone()
    both.round(1, compute)
    torch.testing.assert_close(
        (both.ours.body[-1].weight.detach() - before).abs(), torch.full_like(before, 1e-3), rtol=1e-2, atol=1e-6
    )


# ------------------------------------------------------------------ what a round does not change


def test_adversarial_loss_is_zero_in_warmup_and_where_they_disagree(
    bench: Callable[..., Bench], compute: Compute, student: Classifier
) -> None:
    assert float(bench().round(0, compute).losses[2]) == 0
    assert float(bench().round(0, compute, student).losses[2]) < 0
    # A student that always predicts one class has a loss only on images that the teacher assigns to that class.
    stubborn = copy.deepcopy(student)
    head = stubborn.backbone.get_submodule("fc")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    both = bench(g_steps=1)
    made, wanted = both.round(0, compute, stubborn), both.reference_round(0, stubborn)
    assert float(made.losses[2]) == pytest.approx(wanted.steps[0].adv, rel=1e-4)
    assert wanted.steps[0].adv < 0
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    assert float(losses.adversarial_loss(logits, logits.flip(1).roll(1, 1))) == 0


def test_student_and_teacher_are_untouched(bench: Callable[..., Bench], compute: Compute, student: Classifier) -> None:
    both = bench()
    networks = {"teacher": both.teacher, "student": student.requires_grad_(True)}
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    both.round(0, compute, student)
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key]), f"{name}: {key} changed"
        assert all(parameter.grad is None for parameter in network.parameters()), f"{name} has gradients"
    assert all(not module._forward_pre_hooks for module in both.teacher.modules())


def test_bf16_is_close_to_float32(bench: Callable[..., Bench], compute: Compute, student: Classifier) -> None:
    """bfloat16 has eight bits of precision. The first step differs only by rounding. Later ones differ more, since Adam
    moves every weight by about lr whatever the size of its gradient, so only the total loss is compared there."""
    half = choose("cpu", "bf16")
    first, rough_first = (bench(g_steps=1).round(0, arithmetic, student) for arithmetic in (compute, half))
    torch.testing.assert_close(first.losses, rough_first.losses, rtol=0.05, atol=0.02)
    single, other = bench(), bench()
    ours, rough = single.round(0, compute, student), other.round(0, half, student)
    weights = torch.tensor([single.config.lambda_bn, single.config.lambda_ce, single.config.lambda_adv])
    torch.testing.assert_close((ours.losses * weights).sum(), (rough.losses * weights).sum(), rtol=0.03, atol=0)
    assert float((ours.images.float() - rough.images.float()).abs().mean()) < 6
    assert rough.losses.dtype == torch.float32
    assert other.statistics.memory is not None
    assert all(mean.dtype == torch.float32 for mean, _ in other.statistics.memory)


# ------------------------------------------------------------------ drawing from a trained generator


def test_drawing_has_no_side_effects_and_gives_the_requested_number(
    bench: Callable[..., Bench], compute: Compute, stream: Stream
) -> None:
    both = bench()
    both.round(0, compute)
    before = copy.deepcopy(both.ours.state_dict())
    memory = both.statistics.memory
    assert memory is not None
    kept = [(mean.clone(), variance.clone()) for mean, variance in memory]

    def draw(purpose: int) -> tuple[Tensor, Tensor]:
        return draw_images(
            both.ours,
            both.embeddings,
            both.teacher,
            memory,
            both.config,
            compute,
            lambda number: stream(100 * purpose + number),
            20,
        )

    images, labels = draw(1)
    assert images.shape == (20, 2, 8, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] * 2 + [0, 1, 2, 0]
    for name, value in both.ours.state_dict().items():
        assert torch.equal(value, before[name]), name
    for (mean, variance), (old_mean, old_variance) in zip(memory, kept, strict=True):
        assert torch.equal(mean, old_mean)
        assert torch.equal(variance, old_variance)
    again, _ = draw(1)
    assert torch.equal(images, again)
    other, _ = draw(2)
    assert not torch.equal(images, other)
