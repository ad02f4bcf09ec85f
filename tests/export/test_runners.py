"""Runners: batches, threads, providers, what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.export import runners
from nayer_edge.export.onnx_file import read_onnx, write_onnx
from nayer_edge.export.runners import OrtRunner, TensorRtRunner, TorchRunner
from nayer_edge.export.to_onnx import to_onnx

SHAPE = (3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runners") / "m.onnx"
    to_onnx(network(), SHAPE, found)
    return found


def images(n: int) -> np.ndarray:
    return np.random.default_rng(0).random((n, *SHAPE), np.float32)


def test_any_number_of_images_gives_the_same_logits_as_one_by_one(path: Path) -> None:
    with OrtRunner(path, batch=4) as runner:
        all_at_once = runner.infer(images(11))
        one_by_one = np.concatenate([runner.infer(image[None]) for image in images(11)])
    assert all_at_once.dtype == np.float32
    np.testing.assert_allclose(all_at_once, one_by_one, atol=1e-6)


def test_torch_runner_evaluates_and_restores() -> None:
    model, before = network().train(), torch.get_num_threads()
    with TorchRunner(model, threads=1, batch=3) as runner:
        assert torch.get_num_threads() == 1
        assert not model.training
        np.testing.assert_allclose(runner.infer(images(7))[:1], runner.infer(images(1)), atol=1e-6)
    assert model.training
    assert model[1].training
    assert torch.get_num_threads() == before


def test_a_provider_that_is_not_there_is_missing_not_replaced(path: Path) -> None:
    assert "CUDAExecutionProvider" not in ort.get_available_providers()
    runner = OrtRunner(path, provider="CUDAExecutionProvider")
    with pytest.raises(MissingError, match="no CUDAExecutionProvider") as caught, runner:
        pass
    assert "pip install '.[gpu]'" in caught.value.fix
    assert caught.value.exit_code == 3


def test_the_provider_and_threads_are_those_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OrtRunner(path, threads=1) as runner:
        assert runner._session is not None
        assert runner._session.get_providers() == ["CPUExecutionProvider"]
        assert runner._session.get_session_options().intra_op_num_threads == 1
    # One test process of several has a single core.
    monkeypatch.setattr(runners, "usable_cores", lambda: 3)
    assert OrtRunner(path).threads == 3, "by default all"


def test_the_optimised_graph_is_the_runtimes_own(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {node.op_type for node in OrtRunner(path).optimised_graph().graph.node}
    assert kinds & {"FusedConv", "Conv"}
    assert "Relu" not in kinds, "ONNX Runtime fuses it"
    assert not list(tmp_path.iterdir())


def test_wrong_images_are_refused(path: Path) -> None:
    with OrtRunner(path) as runner:
        with pytest.raises(UsageError, match="cannot be run"):
            runner.infer(np.zeros((0, *SHAPE), np.float32))
        with pytest.raises(UsageError, match="cannot be run"):
            runner.infer(np.zeros(SHAPE, np.float32))
        with pytest.raises(UsageError, match="does not run on images of shape"):
            runner.infer(np.zeros((1, 1, 8, 8), np.float32))


def test_a_fixed_batch_is_filled_up(path: Path, tmp_path: Path) -> None:
    model = read_onnx(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    write_onnx(model, tmp_path / "fixed.onnx")
    with OrtRunner(tmp_path / "fixed.onnx") as fixed, OrtRunner(path) as free:
        np.testing.assert_allclose(fixed.infer(images(6)), free.infer(images(6)), atol=1e-6)


def test_a_graph_that_does_not_load_is_an_integrity_error(path: Path, tmp_path: Path) -> None:
    model = read_onnx(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="does not load"), OrtRunner(tmp_path / "odd.onnx"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_without_a_gpu_is_missing_something(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "e.engine").write_bytes(b"x")
    with (
        pytest.raises(MissingError, match="needs a GPU"),
        TensorRtRunner(tmp_path / "e.engine", flavour="tensorrt_rtx"),
    ):
        pass
