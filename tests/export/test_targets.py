"""The table of targets and of operators eligible for INT8."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.export.targets import (
    CARRIERS,
    EXCLUSIONS,
    FLOAT_PRODUCTS,
    PRODUCTS,
    TARGETS,
    Product,
    exclusion,
    get_target,
    quantized_operators,
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
    ("product", "target", "expected"),
    [
        (Product("Conv", True, 1, 64, 64), "cpu", None),
        (Product("Conv", True, 1, 3, 64), "cpu", None),
        (Product("Conv", True, 64, 1, 1), "cpu", None),
        (Product("Gemm", True, 1, 64, 10), "cpu", None),
        (Product("MatMul", False), "cpu", "two activations"),
        (Product("Einsum", False), "cpu", "no quantized form"),
        (Product("LSTM", False), "tensorrt", "no quantized form"),
        (Product("ConvTranspose", True, 1, 64, 64), "cpu", "transposed convolution"),
        (Product("ConvTranspose", True, 1, 64, 64), "tensorrt", None),
        (Product("Conv", True, 1, 64, 64), "tensorrt", None),
        (Product("Conv", True, 1, 3, 64), "tensorrt", "narrow convolution"),
        (Product("Conv", True, 64, 1, 1), "tensorrt-rtx", "depthwise convolution"),
        (Product("Conv", True, 4, 16, 16), "tensorrt-rtx", None),
        (Product("Gemm", True, 1, 64, 2), "tensorrt", None),
    ],
)
def test_which_products_are_eligible(product: Product, target: str, expected: str | None) -> None:
    found = exclusion(product, get_target(target))
    assert (found.name if found else None) == expected


def test_every_exclusion_and_carrier_states_its_reason_once() -> None:
    assert all(len(e.reason) > 20 and set(e.targets) <= set(TARGETS) for e in EXCLUSIONS)
    assert all(c.reason for c in CARRIERS)
    assert len({c.op_type for c in CARRIERS}) == len(CARRIERS)
    assert len({*PRODUCTS, *FLOAT_PRODUCTS}) == len(PRODUCTS) + len(FLOAT_PRODUCTS)
    assert not {c.op_type for c in CARRIERS} & {*PRODUCTS, *FLOAT_PRODUCTS}
    assert not set(quantized_operators(get_target("cpu"))) & set(FLOAT_PRODUCTS)


def test_only_products_can_be_asked_about() -> None:
    with pytest.raises(UsageError, match="Softmax"):
        exclusion(Product("Softmax", True), get_target("cpu"))


def test_operators_chain_only_where_outputs_are_quantized() -> None:
    assert set(quantized_operators(get_target("tensorrt"))) == set(PRODUCTS)
    assert {"Add", "Relu", "GlobalAveragePool"} <= set(quantized_operators(get_target("cpu")))
    assert "Softmax" not in quantized_operators(get_target("cpu"))
