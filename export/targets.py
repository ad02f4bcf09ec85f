"""The targets in one table: what each device wants of an INT8 graph, and which operators are eligible.

One Q/DQ file cannot serve them all: x86 wants unsigned activations, TensorRT refuses zero points and INT32
biases. docs/ARCHITECTURE.md ("Deployment") says what follows from the table.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from nayer_edge.errors import UsageError, nearest

FP16_SCALES = 19
"""the first opset whose QuantizeLinear takes scales in FP16"""
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Target:
    """A kind of device and the INT8 graph that it needs.

    Attributes:
        name: as typed after --target.
        runtime: what runs the artefact.
        activations: integer type of activations.
        symmetric: activations have zero point 0 (a refusal by the parser otherwise, for TensorRT).
        weights: integer type of weights; always symmetric, one scale per output channel.
        weight_max: largest magnitude of a quantized weight: 127, or 64 (7 bits) where a processor adds two products in
            16 bits.
        bias: "int32" (scale = input scale × weight scale) or "float" (left as it is).
        outputs: Q/DQ also on the outputs of quantized operators, so that they chain in INT8.
        residual: which inputs of a residual Add get Q/DQ: "both", or "skip" (the other one fuses with its
            convolution).
        rest: what everything else computes in.
        precisions: artefacts worth making for this target.
        engine: an engine is built from the ONNX file.
        session_options: ONNX Runtime session configuration that stands for this device.
        why: the reasons, for the report and for readers.
    """

    name: str
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    activations: Literal["uint8", "int8"]
    symmetric: bool
    weights: Literal["int8"]
    weight_max: Literal[127, 64]
    bias: Literal["int32", "float"]
    outputs: bool
    residual: Literal["both", "skip"]
    rest: Literal["float32", "float16"]
    precisions: tuple[Precision, ...]
    engine: bool
    session_options: tuple[tuple[str, str], ...]
    why: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            runtime="onnxruntime",
            activations="uint8",
            symmetric=False,
            weights="int8",
            weight_max=64,
            bias="int32",
            outputs=True,
            residual="both",
            rest="float32",
            precisions=("fp32", "int8"),
            engine=False,
            session_options=(),
            why="x86 multiplies unsigned by signed bytes; signed activations are not fused by ONNX Runtime there "
            "and run no faster than FP32. Processors without VNNI (AVX2: Intel before 2019, AMD before Zen 4) add "
            "two products in 16 bits, which 8-bit weights overflow: 7 bits give the same answers on both.",
        ),
        Target(
            name="arm",
            runtime="onnxruntime",
            activations="int8",
            symmetric=False,
            weights="int8",
            weight_max=127,
            bias="int32",
            outputs=True,
            residual="both",
            rest="float32",
            precisions=("fp32", "int8"),
            engine=False,
            # The default of ONNX Runtime's ARM builds, needed to see on x86 what an ARM device would fuse.
            session_options=(("session.qdqisint8allowed", "1"),),
            why="ARM multiplies signed by signed bytes (SDOT); a zero point keeps all 8 bits after a ReLU "
            "and lets the ReLU disappear into the convolution's saturation.",
        ),
        Target(
            name="tensorrt",
            runtime="tensorrt",
            activations="int8",
            symmetric=True,
            weights="int8",
            weight_max=127,
            bias="float",
            outputs=False,
            residual="skip",
            rest="float16",
            precisions=("fp32", "fp16", "int8"),
            engine=True,
            session_options=(),
            why="The parser rejects INT32 biases and zero points; Q/DQ between a convolution and the ReLU "
            "or Add that follows it prevents their fusion; strongly typed engines run the rest in the type "
            "that the graph states.",
        ),
        Target(
            name="tensorrt-rtx",
            runtime="tensorrt_rtx",
            activations="int8",
            symmetric=True,
            weights="int8",
            weight_max=127,
            bias="float",
            outputs=False,
            residual="skip",
            rest="float16",
            precisions=("fp32", "fp16", "int8"),
            engine=True,
            session_options=(),
            why="As tensorrt. Its support matrix lists INT8 as weight-only, so FP16 is offered beside it, "
            "and what the layers really run in is read from the engine where a GPU lets it be loaded.",
        ),
    )
}


def get_target(name: str) -> Target:
    """The target of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(
            f"There is no target '{name}'.{nearest(name, TARGETS)}",
            why=f"The targets are {', '.join(TARGETS)}.",
        )
    return TARGETS[name]


def is_native(target: Target) -> bool:
    """What ONNX Runtime computes here for this target is what its device computes: the kernels are the same."""
    machine = platform.machine().lower()
    return target.name == "cpu" or (target.name == "arm" and machine in ("aarch64", "arm64"))


@dataclass(frozen=True)
class Product:
    """What eligibility is judged by: one multiply-accumulate operator of a graph.

    Attributes:
        op_type: ONNX operator.
        constant_weight: its second input is a constant of the model.
        groups: of a convolution, else 1.
        channels_in: input channels per group (of Gemm and MatMul: rows of the weight).
        channels_out: output channels per group (of Gemm and MatMul: columns).
        matrix: its weight has the dimensions that the operator's INT8 form takes: of MatMul, two.
    """

    op_type: str
    constant_weight: bool
    groups: int = 1
    channels_in: int = 0
    channels_out: int = 0
    matrix: bool = True


@dataclass(frozen=True)
class Exclusion:
    """A multiply-accumulate operator that is not eligible for INT8, and why."""

    name: str
    targets: tuple[str, ...]
    applies: Callable[[Product], bool]
    reason: str


# Operators that multiply and accumulate: the ones that coverage counts.
PRODUCTS: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# They do, too, but are quantized nowhere: named as excluded, so that coverage does not pass over them in silence.
FLOAT_PRODUCTS: tuple[str, ...] = ("Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN")

_TENSORRT = ("tensorrt", "tensorrt-rtx")

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        name="no quantized form",
        targets=tuple(TARGETS),
        applies=lambda p: p.op_type in FLOAT_PRODUCTS,
        reason="neither ONNX Runtime's kernels nor TensorRT's rules for Q/DQ have a static INT8 form of it",
    ),
    Exclusion(
        name="two activations",
        targets=tuple(TARGETS),
        applies=lambda p: not p.constant_weight,
        reason="both factors are activations: there is no constant weight to quantize per channel",
    ),
    Exclusion(
        name="weight is no matrix",
        targets=tuple(TARGETS),
        applies=lambda p: not p.matrix,
        reason="a product with a vector or with a stack of matrices has no INT8 form with one scale per output channel",
    ),
    Exclusion(
        name="transposed convolution",
        targets=("cpu", "arm"),
        applies=lambda p: p.op_type == "ConvTranspose",
        reason="ONNX Runtime has no INT8 kernel for ConvTranspose",
    ),
    Exclusion(
        name="depthwise convolution",
        targets=_TENSORRT,
        applies=lambda p: p.groups > 1 and min(p.channels_in, p.channels_out) < 8,
        reason="TensorRT lacks INT8 tactics for some depthwise and narrow grouped convolutions, and the build "
        "then fails (NVIDIA/TensorRT issues 3385 and 4060); bandwidth-bound, they gain nothing over FP16",
    ),
    Exclusion(
        name="narrow convolution",
        targets=_TENSORRT,
        applies=lambda p: p.op_type.startswith("Conv") and p.groups == 1 and min(p.channels_in, p.channels_out) < 8,
        reason="INT8 tensor cores pad channels to 16 or 32, so a convolution with fewer than 8 channels on one "
        "side, such as the one that reads the image, is slower than in FP16 or has no tactic",
    ),
)


def exclusion(product: Product, target: Target) -> Exclusion | None:
    """Why this product is not eligible for INT8 on the target; None where it is eligible.

    Raises:
        UsageError: it is not an operator that multiplies and accumulates.
    """
    if product.op_type not in (*PRODUCTS, *FLOAT_PRODUCTS):
        raise UsageError(f"'{product.op_type}' is not one of {', '.join((*PRODUCTS, *FLOAT_PRODUCTS))}.")
    return next((e for e in EXCLUSIONS if target.name in e.targets and e.applies(product)), None)


@dataclass(frozen=True)
class Carrier:
    """An operator without weights: quantized along (or not), so that two products chain in INT8."""

    op_type: str
    quantized: bool
    reason: str


# For targets whose operators chain in INT8 (Target.outputs).
CARRIERS: tuple[Carrier, ...] = (
    Carrier("Relu", True, "disappears into the saturation of the operator before it"),
    Carrier("Clip", True, "disappears into the saturation of the operator before it"),
    Carrier("Add", True, "QLinearAdd"),
    Carrier("Mul", True, "QLinearMul"),
    Carrier("Concat", True, "QLinearConcat"),
    Carrier("MaxPool", True, "runs on bytes as it is"),
    Carrier("AveragePool", True, "QLinearAveragePool"),
    Carrier("GlobalAveragePool", True, "QLinearGlobalAveragePool"),
    Carrier("Flatten", True, "moves bytes"),
    Carrier("Reshape", True, "moves bytes"),
    Carrier("Transpose", True, "moves bytes"),
    Carrier("Squeeze", True, "moves bytes"),
    Carrier("Unsqueeze", True, "moves bytes"),
    Carrier("Slice", True, "moves bytes"),
    Carrier("Split", True, "moves bytes"),
    Carrier("Sub", False, "no INT8 kernel; here it normalises the float image"),
    Carrier("Div", False, "no INT8 kernel; here it normalises the float image"),
    Carrier("BatchNormalization", False, "no INT8 kernel; one that follows a convolution is folded into it"),
    Carrier("ReduceMean", False, "no INT8 kernel; global means are exported as GlobalAveragePool"),
    Carrier("HardSigmoid", False, "no INT8 kernel"),
    Carrier("HardSwish", False, "no INT8 kernel; ONNX Runtime computes it as HardSigmoid and Mul"),
    Carrier("Sigmoid", False, "8 bits of input range lose its slope; cheap in float"),
    Carrier("Softmax", False, "exponentials need more than 8 bits"),
    Carrier("LayerNormalization", False, "variances need more than 8 bits"),
    Carrier("InstanceNormalization", False, "variances need more than 8 bits"),
    Carrier("GroupNormalization", False, "variances need more than 8 bits"),
    Carrier("Gelu", False, "no INT8 kernel"),
    Carrier("Erf", False, "no INT8 kernel; a part of GELU"),
    Carrier("Tanh", False, "8 bits of input range lose its slope; cheap in float"),
    Carrier("LeakyRelu", False, "rare in students; the products around it stay in INT8"),
    Carrier("Pad", False, "rare in students, whose convolutions pad themselves; the products around it stay in INT8"),
    Carrier("Resize", False, "rare in classifiers; the products around it stay in INT8"),
    Carrier("Identity", False, "gone after constant folding"),
    Carrier("Cast", False, "here it turns the bytes of the image into floats"),
)


def quantized_operators(target: Target) -> tuple[str, ...]:
    """Operator types that get Q/DQ: the products, and the carriers where operators chain in INT8."""
    carriers: Iterable[str] = (c.op_type for c in CARRIERS if c.quantized) if target.outputs else ()
    return (*PRODUCTS, *carriers)
