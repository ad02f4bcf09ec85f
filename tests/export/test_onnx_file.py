"""Hostile and damaged ONNX files; what is stripped; that bytes are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nayer_edge.errors import IntegrityError
from nayer_edge.export.onnx_file import metadata_of, opset_of, read_onnx, strip, write_onnx
from nayer_edge.export.runners import OrtRunner


def small_model() -> ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(model: ModelProto, location: str) -> ModelProto:
    tensor = model.graph.initializer[0]
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    return model


def test_a_missing_file_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is missing"):
        read_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x00" * 100, b"{}", b"\xff" * 64])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.onnx"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"not an ONNX|cut short"):
        read_onnx(path)
    with pytest.raises(IntegrityError), OrtRunner(path):
        pass


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.onnx"
    data = small_model().SerializeToString()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(IntegrityError, match=r"not an ONNX|cut short"):
        read_onnx(path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "", "link.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones(12, np.float32).tobytes())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = folder / "evil.onnx"
    path.write_bytes(external(small_model(), location).SerializeToString())
    with pytest.raises(IntegrityError, match="outside its own folder"):
        read_onnx(path)
    with pytest.raises(IntegrityError, match="outside its own folder"), OrtRunner(path):
        pass


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.full(12, 7, np.float32).tobytes())
    path = tmp_path / "ok.onnx"
    path.write_bytes(external(small_model(), "weights.bin").SerializeToString())
    model = read_onnx(path, external_data=True)
    assert (numpy_helper.to_array(model.graph.initializer[0]) == 7).all()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        read_onnx(path)


@pytest.mark.parametrize("dims", [[2**30, 2**30], [-1, 2**40], [13], []])
def test_a_shape_that_the_bytes_do_not_have_is_refused(tmp_path: Path, dims: list[int]) -> None:
    model, path = small_model(), tmp_path / "odd.onnx"
    tensor = model.graph.initializer[0]
    assert tensor.HasField("raw_data")
    path.write_bytes(model.SerializeToString())
    read_onnx(path)
    del tensor.dims[:]
    tensor.dims.extend(dims)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=f"a weight '{tensor.name}' whose"):
        read_onnx(path)


def test_four_bit_weights_share_bytes(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "int4.onnx"
    model.graph.initializer.append(helper.make_tensor("w4", TensorProto.INT4, [3], b"\x21\x03", raw=True))
    path.write_bytes(model.SerializeToString())
    assert read_onnx(path).graph.initializer[-1].dims == [3]


def test_strip_leaves_nothing_but_our_provenance(tmp_path: Path) -> None:
    model = small_model()
    model.doc_string = "made in a home folder"
    model.metadata_props.add(key="theirs", value="x")
    model.graph.node[0].doc_string = "File a.py, line 3"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File a.py")
    model.graph.value_info.add().CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    strip(model, metadata={"b": "2", "a": "1"})
    data = model.SerializeToString()
    assert b"a.py" not in data
    assert b"theirs" not in data
    assert b"home folder" not in data
    assert not model.graph.value_info
    assert [entry.domain for entry in model.opset_import] == [""]
    assert list(metadata_of(model)) == ["a", "b"]
    assert opset_of(model) == 20


def test_writing_is_checked_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        write_onnx(small_model(), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    broken = small_model()
    broken.graph.node[0].input[1] = "nobody made this"
    with pytest.raises(IntegrityError, match="not valid ONNX"):
        write_onnx(broken, tmp_path / "c.onnx")
    assert not (tmp_path / "c.onnx").exists()
    assert onnx.load(tmp_path / "a.onnx").graph.node[0].op_type == "Conv"
