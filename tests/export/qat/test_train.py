"""QAT: what is learnt is what ships, and it ships only if it is measured to help."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from nayer_edge.errors import TrainingError, UsageError
from nayer_edge.export.int8.qdq import with_qdq
from nayer_edge.export.onnx_file import metadata_of
from nayer_edge.export.qat.graph_network import GraphNetwork
from nayer_edge.export.qat.train import QatTrainer, Schedule, train
from nayer_edge.export.targets import TARGETS, has_module
from nayer_edge.export.to_int8 import QAT, Int8Result, Method, prepared, run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.runtime.progress import Silent

Once = Callable[[str, Callable[[Path], object]], Path]
SHAPE = (1, 8, 8)
CPU = torch.device("cpu")


def draw(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four noisy patterns."""
    patterns = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 4, (count,), generator=random)
    images = F.interpolate(patterns[labels], scale_factor=2) + 0.25 * torch.randn(count, *SHAPE, generator=random)
    return images.clamp(0, 1), labels


CALIBRATION = draw(64, torch.Generator().manual_seed(1))[0].numpy()
HOLDOUT = draw(300, torch.Generator().manual_seed(2))[0].numpy()


def untrained() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def trained(folder: Path) -> None:
    """The weights and the FP32 file of `student`.

    A depthwise network trained for a moment, one of whose channels is a hundred times as large as the others.

    The next layer takes that back, so FP32 does not change; with one range per tensor the other channels then live on
    a few of the 256 levels. MobileNets come by such channels when BatchNorm is folded (Nagel et al., ICCV 2019, §3.2).
    """
    torch.manual_seed(0)
    model = untrained()
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        images, labels = draw(64, random)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        largest = model[:4](torch.from_numpy(CALIBRATION)).amax(dim=(0, 2, 3)).argmax()
        model[2].weight[largest] *= 100
        model[2].bias[largest] *= 100
        model[4].weight[:, largest] /= 100
    torch.save(model.state_dict(), folder / "weights.pt")
    to_onnx(model.eval(), SHAPE, folder / "fp32.onnx")


@pytest.fixture(scope="module")
def student(once: Once) -> nn.Module:
    model = untrained()
    model.load_state_dict(torch.load(once("qat-student", trained) / "weights.pt"))
    return model.eval()


@pytest.fixture(scope="module")
def fp32(once: Once) -> Path:
    return once("qat-student", trained) / "fp32.onnx"


def trainer(teacher: nn.Module, **changes: float) -> QatTrainer:
    def images_and_logits(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, _ = draw(32, random)
        with torch.no_grad():
            return images, teacher(images)

    schedule = Schedule(**{"epochs": 2, "steps": 30, "lr": 5e-3, "temperature": 2.0, "range_lr": 2e-2} | changes)
    return QatTrainer(images_and_logits, schedule, stream, CPU, Silent())


def stream(epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + epoch)


def quantize(
    fp32: Path, path: Path, qat: QatTrainer | None, target: str = "cpu", method: Method = "minmax"
) -> Int8Result:
    return to_int8(
        fp32, path, CALIBRATION, target, method=method, holdout_images=HOLDOUT, qat=qat,
        bias_correction="off",
    )  # fmt: skip


RESULT = TypeAdapter(Int8Result)


def shared(once: Once, name: str, make: Callable[[Path], Int8Result]) -> Int8Result:
    """What `make` makes of a path, one for all workers."""

    def kept(folder: Path) -> None:
        (folder / "result.json").write_bytes(RESULT.dump_json(make(folder / "int8.onnx")))

    return RESULT.validate_json((once(name, kept) / "result.json").read_bytes())


@pytest.fixture(scope="module")
def plain(fp32: Path, once: Once) -> Int8Result:
    """Calibration alone, for cpu."""
    return shared(once, "qat-plain", lambda path: quantize(fp32, path, None))


@pytest.fixture(scope="module")
def tuned(fp32: Path, student: nn.Module, once: Once) -> Int8Result:
    """QAT for cpu."""
    return shared(once, "qat-tuned", lambda path: quantize(fp32, path, trainer(student)))


def test_it_repairs_what_calibration_cannot(fp32: Path, plain: Int8Result, tuned: Int8Result) -> None:
    record = tuned.record["finetune"]
    assert (tuned.method, record["chosen"], record["start"]) == (QAT, True, "minmax")
    assert plain.record["finetune"] is None
    assert record["calibrated"] == plain.record["final"], "beside exactly what would ship otherwise"
    assert record["finetuned"] == tuned.record["final"] == tuned.record["methods"][QAT]
    assert record["finetuned"]["top1"] > record["calibrated"]["top1"] + 0.02, "a loss worth repairing"
    assert record["gain"] == pytest.approx(record["finetuned"]["top1"] - record["calibrated"]["top1"])
    assert record["loss"][-1] < record["loss"][0]
    fp32_classes = run_onnx(fp32, HOLDOUT).argmax(1)
    measured = (run_onnx(tuned.path, HOLDOUT).argmax(1) == fp32_classes).mean()
    assert measured == pytest.approx(record["finetuned"]["top1"]), "the file is what was measured"
    assert metadata_of(onnx.load(tuned.path))["nayer_edge.calibration"].startswith(QAT)
    assert tuned.coverage.fraction == 1.0


def test_without_it_not_a_bit_changes(fp32: Path, student: nn.Module, plain: Int8Result, tmp_path: Path) -> None:
    """If QAT lowers the agreement, the file is that of calibration alone."""
    lost = quantize(fp32, tmp_path / "lost.onnx", trainer(nn.Sequential(student, Wrong()), lr=0.05))
    assert lost.record["finetune"]["chosen"] is False
    assert lost.record["finetune"]["gain"] < 0
    assert lost.method == "minmax"
    assert lost.sha256 == plain.sha256
    ignored = {"finetune", "methods"}
    assert {k: v for k, v in lost.record.items() if k not in ignored} == {
        k: v for k, v in plain.record.items() if k not in ignored
    }
    assert lost.record["methods"].keys() - plain.record["methods"].keys() == {QAT}


class Wrong(nn.Module):
    """A teacher that swaps all classes."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.flip(1)


def test_the_file_is_the_network_that_was_trained(
    fp32: Path, student: nn.Module, tuned: Int8Result, tmp_path: Path
) -> None:
    """torch's fake quantization against the exported file in ONNX Runtime, on images that neither has seen."""
    images = HOLDOUT[:100]
    results = {"cpu": tuned, "arm": quantize(fp32, tmp_path / "arm.onnx", trainer(student), "arm")}
    for target, result in results.items():
        assert result.method == QAT
        graph = prepared(fp32, tmp_path / "prepared.onnx")
        for tensor in graph.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(tuned_value(result, tensor.name, graph), tensor.name))
        ranges = {name: (low, high) for name, (low, high) in result.record["ranges"].items()}
        network = GraphNetwork(graph, with_qdq(graph, ranges, TARGETS[target]), ranges, TARGETS[target])
        with torch.no_grad():
            wanted = network(torch.from_numpy(images)).numpy()
        found = run_onnx(result.path, images, as_written=True)
        assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.98
        assert np.abs(found - wanted).mean() < 0.02 * np.abs(wanted).mean()


def tuned_value(result: Int8Result, name: str, graph: ModelProto) -> np.ndarray:
    """A constant of the graph as it lies, dequantized, in the written file."""
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(result.path).graph.initializer}
    original = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}[name]
    if f"{name}_quantized" not in written:
        return written.get(name, original).astype(original.dtype)
    levels = written[f"{name}_quantized"].astype(np.float32)
    scale = written.get(f"{name}_scale", written.get(f"{name}_quantized_scale"))
    assert scale is not None
    shape = [-1] + [1] * (levels.ndim - 1) if np.ndim(scale) else []
    return levels * scale.astype(np.float32).reshape(shape)


def test_the_same_images_give_the_same_bits(fp32: Path, student: nn.Module, tmp_path: Path) -> None:
    first, second = (quantize(fp32, tmp_path / f"{i}.onnx", trainer(student, steps=3)) for i in range(2))
    assert first.sha256 == second.sha256
    assert first.record == second.record


def test_targets_with_equal_graphs_share_a_network(fp32: Path, student: nn.Module, tmp_path: Path) -> None:
    trained: list[str] = []

    class Listener(Silent):
        def start(self, what: str, total: int) -> None:
            assert total == 2
            trained.append(what)

    one = trainer(student, epochs=1, steps=2)
    one.progress = Listener()
    results = {
        name: quantize(fp32, tmp_path / f"{name}.onnx", one, name)
        for name, target in TARGETS.items()
        if not has_module(target)
    }
    assert trained == ["QAT for cpu", "QAT for arm", "QAT for tensorrt"]
    assert results["tensorrt-rtx"].record["finetune"]["first"] == "tensorrt"
    learnt = [results[name].record["finetune"]["loss"] for name in ("tensorrt", "tensorrt-rtx")]
    assert learnt[0] == learnt[1]


def test_a_target_calibrated_differently_has_its_own_start(fp32: Path, student: nn.Module, tmp_path: Path) -> None:
    """Although another target, whose graph rounds the same tensors to the same types, was trained before."""
    one, another = (trainer(student, epochs=1, steps=2) for _ in range(2))
    quantize(fp32, tmp_path / "first.onnx", one, "tensorrt")
    second = quantize(fp32, tmp_path / "second.onnx", one, "tensorrt-rtx", "percentile")
    alone = quantize(fp32, tmp_path / "alone.onnx", another, "tensorrt-rtx", "percentile")
    assert (second.record["finetune"]["start"], second.record["finetune"]["first"]) == ("percentile", "tensorrt-rtx")
    assert second.record == alone.record


def test_excluded_layers_are_not_rounded(fp32: Path, student: nn.Module) -> None:
    """The same graph without a single Q/DQ: QAT then starts at a loss of zero."""
    graph = onnx.load(fp32)
    everything = [n.name for n in graph.graph.node if n.op_type in ("Conv", "Gemm")]
    qat = trainer(student, epochs=1, steps=1)
    found = qat(graph, {}, TARGETS["cpu"], everything)
    assert found.record["loss"] == [pytest.approx(0.0, abs=1e-6)]
    rounded = trainer(student, epochs=1, steps=1)
    ranges = {name: (0.0, 2.0) for node in graph.graph.node for name in (*node.input, *node.output)}
    assert rounded(graph, ranges, TARGETS["cpu"], ()).record["loss"][0] > 1e-4


def test_a_loss_that_is_not_finite_ends_with_the_epoch_and_advice(student: nn.Module) -> None:
    def broken(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(8, random)[0], torch.full((8, 4), float("nan"))

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(TrainingError, match=r"epoch 0[\s\S]*export.qat_lr"):
        train(network, list(network.parameters()), [], broken, Schedule(1, 1, 1e-3, 4.0), stream)


def test_the_schedule_decays_to_nothing() -> None:
    """A cosine from each group's own rate to 0, by its closed form."""
    network = nn.Linear(64, 4)
    seen: list[list[float]] = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *arguments: object) -> object:
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        images = torch.rand(8, 64)
        train(
            network, [network.weight], [network.bias], lambda _: (images, torch.zeros(8, 4)),
            Schedule(2, 3, 0.1, 4.0, 0.02), stream,
        )  # fmt: skip
    wanted = [0.5 * (1 + np.cos(np.pi * i / 6)) for i in range(6)]
    np.testing.assert_allclose(seen, [[0.1 * f, 0.02 * f] for f in wanted], rtol=1e-6)


def test_every_epoch_draws_from_its_own_stream(student: nn.Module) -> None:
    qat = trainer(student, epochs=3, steps=2)
    seen: list[torch.Tensor] = []
    inner: Callable[..., tuple[torch.Tensor, torch.Tensor]] = qat.draw

    def spy(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(inner(random)[0])
        return seen[-1], torch.zeros(32, 4)

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    train(network, list(network.parameters()), [], spy, qat.schedule, stream)
    assert len(seen) == 6
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_it_needs_a_hold_out(fp32: Path, student: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="QAT needs hold-out images"):
        to_int8(fp32, tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax", qat=trainer(student))
    assert not (tmp_path / "m.onnx").exists()


def test_agreement_with_the_teacher_is_recorded(fp32: Path, student: nn.Module, tmp_path: Path) -> None:
    teacher_logits = run_onnx(fp32, HOLDOUT)
    result = to_int8(
        fp32, tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax", holdout_images=HOLDOUT,
        qat=trainer(student, steps=2), teacher_logits=teacher_logits,
    )  # fmt: skip
    record = result.record["finetune"]["vs_teacher"]
    assert record["fp32"]["top1"] == 1.0
    # Here the teacher is the FP32 student: every changed answer is lost.
    for version in ("calibrated", "finetuned"):
        found = result.record["finetune"][version]
        changed = round((1 - found["top1"]) * found["n"])
        assert found == {**record[version], "lost": changed, "gained": 0}
