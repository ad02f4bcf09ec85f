"""The tables of targets and of operators."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.export.targets import (
    FLOAT_ONLY_OPS,
    INELIGIBLE_OPS,
    PASS_THROUGH_OPS,
    QUANTIZABLE_OPS,
    TARGETS,
    QuantizableOp,
    get_target,
    quantized_operators,
    why_ineligible,
)


def test_an_unknown_target_names_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="Did you mean 'tensorrt-rtx'"):
        get_target("tensorrt-rxt")


def test_the_table_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; import nayer_edge.export.targets\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_x86_multiplies_unsigned_by_signed_and_tensorrt_is_symmetric() -> None:
    assert (TARGETS["cpu"].activations, TARGETS["cpu"].weights) == ("uint8", "int8")
    assert (TARGETS["arm"].activations, TARGETS["arm"].weights) == ("int8", "int8")
    for name in ("tensorrt", "tensorrt-rtx"):
        assert TARGETS[name].symmetric
        assert TARGETS[name].bias == "float"
        assert TARGETS[name].residual == "skip"


@pytest.mark.parametrize(
    ("op", "target", "expected"),
    [
        (QuantizableOp("Conv", True, 1, 64, 64), "cpu", None),
        (QuantizableOp("Conv", True, 1, 3, 64), "cpu", None),
        (QuantizableOp("Conv", True, 64, 1, 1), "cpu", None),
        (QuantizableOp("Gemm", True, 1, 64, 10), "cpu", None),
        (QuantizableOp("MatMul", False), "cpu", "two activations"),
        (QuantizableOp("Einsum", False), "cpu", "no quantized form"),
        (QuantizableOp("LSTM", False), "tensorrt", "no quantized form"),
        (QuantizableOp("ConvTranspose", True, 1, 64, 64), "cpu", "transposed convolution"),
        (QuantizableOp("ConvTranspose", True, 1, 64, 64), "tensorrt", None),
        (QuantizableOp("Conv", True, 1, 64, 64), "tensorrt", None),
        (QuantizableOp("Conv", True, 1, 3, 64), "tensorrt", "narrow convolution"),
        (QuantizableOp("Conv", True, 64, 1, 1), "tensorrt-rtx", "depthwise convolution"),
        (QuantizableOp("Conv", True, 4, 16, 16), "tensorrt-rtx", None),
        (QuantizableOp("Gemm", True, 1, 64, 2), "tensorrt", None),
    ],
)
def test_which_operators_are_eligible(op: QuantizableOp, target: str, expected: str | None) -> None:
    found = why_ineligible(op, get_target(target))
    assert (found.name if found else None) == expected


def test_every_rule_has_a_reason_and_every_operator_one_rule() -> None:
    assert all(len(rule.reason) > 20 and set(rule.targets) <= set(TARGETS) for rule in INELIGIBLE_OPS)
    assert all(op.reason for op in PASS_THROUGH_OPS)
    listed = [*QUANTIZABLE_OPS, *FLOAT_ONLY_OPS, *(op.op_type for op in PASS_THROUGH_OPS)]
    assert len(set(listed)) == len(listed)
    assert not set(quantized_operators(get_target("cpu"))) & set(FLOAT_ONLY_OPS)


def test_other_operators_are_refused() -> None:
    with pytest.raises(UsageError, match="Softmax"):
        why_ineligible(QuantizableOp("Softmax", True), get_target("cpu"))


def test_pass_through_operators_are_quantized_only_where_outputs_are() -> None:
    assert set(quantized_operators(get_target("tensorrt"))) == set(QUANTIZABLE_OPS)
    assert {"Add", "Relu", "GlobalAveragePool"} <= set(quantized_operators(get_target("cpu")))
    assert "Softmax" not in quantized_operators(get_target("cpu"))
