"""One table of targets: the INT8 graph that each device needs, and which operators it can run in INT8.

One Q/DQ file cannot serve all devices: x86 needs unsigned activations, TensorRT rejects zero points and INT32 biases.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nayer_edge.errors import UsageError, nearest

FP16_SCALES = 19
"""first opset whose QuantizeLinear accepts FP16 scales"""
Precision = Literal["fp32", "fp16", "int8"]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "executorch", "litert"]
FILE_SUFFIXES = (".onnx", ".engine", ".pte", ".tflite")
"""endings of the files that are shipped"""


@dataclass(frozen=True)
class Target:
    """A kind of device and the INT8 graph that it needs.

    Attributes:
        name: value of --target.
        runtime: runs the artifact. Runtimes other than ONNX Runtime and TensorRT have a module in runtimes/.
        activations: integer type of activations.
        symmetric: activations have zero point 0 (TensorRT's parser rejects any other).
        weights: integer type of weights; always symmetric, with one scale per output channel.
        weight_max: largest magnitude of a quantized weight: 127, or 64 (7 bits) for processors that add two products
            in 16 bits.
        bias: "int32" (scale = input scale × weight scale) or "float" (not quantized).
        outputs: also put Q/DQ on the outputs of quantized operators, so that consecutive ones stay in INT8.
        residual: inputs of a residual Add that get Q/DQ: "both", or "skip" (the other input fuses with its
            convolution).
        rest: type of everything that is not quantized.
        precisions: precisions that are useful on this target.
        engine: an engine is built from the ONNX file.
        suffix: ending of its files. ".onnx": the runtime reads ONNX, and INT8 is a graph with Q/DQ by the rules of this
            row.
        packages: what a runtime with a module in runtimes/ needs to build and to run its files, the runtime first. An
            extra of the target's name installs them.
        session_options: ONNX Runtime session options that emulate this device.
        why: reasons, for the report and for readers.
    """

    name: str
    runtime: Runtime
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
    suffix: str
    packages: tuple[str, ...]
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
            suffix=".onnx",
            packages=(),
            session_options=(),
            why="x86 multiplies unsigned by signed bytes; ONNX Runtime does not fuse signed activations on x86, where "
            "they run no faster than FP32. Processors without VNNI (AVX2: Intel before 2019, AMD before Zen 4) add two "
            "products in 16 bits, which overflows with 8-bit weights; 7 bits give the same results on all x86.",
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
            suffix=".onnx",
            packages=(),
            # The default in ONNX Runtime's ARM builds; on x86 it shows what an ARM device would fuse.
            session_options=(("session.qdqisint8allowed", "1"),),
            why="ARM multiplies signed by signed bytes (SDOT); a zero point uses all 8 bits after a ReLU and lets the "
            "convolution's saturation replace the ReLU.",
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
            suffix=".onnx",
            packages=(),
            session_options=(),
            why="The parser rejects INT32 biases and zero points; Q/DQ between a convolution and the ReLU or Add after "
            "it prevents their fusion; strongly typed engines run everything else in the type given in the graph.",
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
            suffix=".onnx",
            packages=(),
            session_options=(),
            why="As tensorrt. Its support matrix lists INT8 as weight-only, so FP16 is offered as well, and the actual "
            "precision of the layers is read from the engine when a GPU is available to load it.",
        ),
        Target(
            name="openvino",
            runtime="openvino",
            activations="uint8",
            symmetric=False,
            weights="int8",
            weight_max=64,
            bias="int32",
            outputs=True,
            residual="both",
            rest="float32",
            precisions=("fp32", "fp16", "int8"),
            engine=False,
            suffix=".onnx",
            packages=("openvino",),
            session_options=(),
            why="OpenVINO reads our Q/DQ graphs, and computes the same layers in INT8 whether activations are UINT8 or "
            "INT8, symmetric or not (ResNet-8, MobileNetV3-small). Symmetric ones were a little further from FP32. Its "
            "kernels for processors without VNNI overflow with 8-bit weights, as ONNX Runtime's do.",
        ),
        Target(
            name="executorch",
            runtime="executorch",
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
            suffix=".pte",
            packages=("executorch", "torchao"),
            session_options=(),
            why="What XNNPACK's own quantizer makes, through torchao. The file converts float32 images and logits. "
            "There is no FP16 file: it would not be smaller (ResNet-8: 318 instead of 320 kB).",
        ),
        Target(
            name="litert",
            runtime="litert",
            activations="int8",
            symmetric=False,
            weights="int8",
            weight_max=127,
            bias="int32",
            outputs=True,
            residual="both",
            rest="float32",
            precisions=("fp32", "fp16", "int8"),
            engine=False,
            suffix=".tflite",
            packages=("ai-edge-litert", "ai-edge-quantizer", "litert-torch"),
            session_options=(),
            why="What ai-edge-quantizer makes of the converted network. Input and output stay float32. "
            "FP16 files hold FP16 weights, which processors without FP16 arithmetic convert to float32.",
        ),
    )
}


def has_module(target: Target) -> bool:
    """Whether the target's runtime has a module in runtimes/, which runs and reads back its FP32 and INT8 files."""
    return bool(target.packages)


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


def is_arm() -> bool:
    """Whether this machine has an ARM processor."""
    return platform.machine().lower() in ("aarch64", "arm64")


def is_native(target: Target) -> bool:
    """Whether ONNX Runtime runs the same kernels on this machine as on the target device."""
    return target.name == "cpu" or (target.name == "arm" and is_arm())


@dataclass(frozen=True)
class QuantizableOp:
    """A multiply-accumulate operator, with the properties that decide whether a target can run it in INT8.

    Attributes:
        op_type: ONNX operator.
        constant_weight: the second input is a constant of the model.
        groups: of a convolution, else 1.
        channels_in: input channels per group (Gemm and MatMul: rows of the weight).
        channels_out: output channels per group (Gemm and MatMul: columns of the weight).
        matrix: the weight has a rank that the INT8 form of the operator accepts (MatMul: two).
    """

    op_type: str
    constant_weight: bool
    groups: int = 1
    channels_in: int = 0
    channels_out: int = 0
    matrix: bool = True


@dataclass(frozen=True)
class IneligibleOp:
    """A rule by which targets cannot, or should not, run a multiply-accumulate operator in INT8."""

    name: str
    targets: tuple[str, ...]
    applies: Callable[[QuantizableOp], bool]
    reason: str


# Multiply-accumulate operators with an INT8 form. INT8 coverage counts these.
QUANTIZABLE_OPS: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Multiply-accumulate operators without one. They are listed as ineligible, so that coverage does not ignore them.
FLOAT_ONLY_OPS: tuple[str, ...] = ("Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN")

_TENSORRT = ("tensorrt", "tensorrt-rtx")

INELIGIBLE_OPS: tuple[IneligibleOp, ...] = (
    IneligibleOp(
        name="no quantized form",
        targets=tuple(TARGETS),
        applies=lambda op: op.op_type in FLOAT_ONLY_OPS,
        reason="neither ONNX Runtime's kernels nor TensorRT's Q/DQ rules have a static INT8 form of it",
    ),
    IneligibleOp(
        name="two activations",
        targets=tuple(TARGETS),
        applies=lambda op: not op.constant_weight,
        reason="both factors are activations, so there is no constant weight to quantize per channel",
    ),
    IneligibleOp(
        name="weight is not a matrix",
        targets=tuple(TARGETS),
        applies=lambda op: not op.matrix,
        reason="a product with a vector or a stack of matrices has no INT8 form with one scale per output channel",
    ),
    IneligibleOp(
        name="transposed convolution",
        targets=("cpu", "arm"),
        applies=lambda op: op.op_type == "ConvTranspose",
        reason="ONNX Runtime has no INT8 kernel for ConvTranspose",
    ),
    IneligibleOp(
        name="grouped transposed convolution",
        targets=("openvino",),
        applies=lambda op: op.op_type == "ConvTranspose" and op.groups > 1,
        reason="its weight has one scale per output channel of a group, not of all",
    ),
    IneligibleOp(
        name="depthwise convolution",
        targets=_TENSORRT,
        applies=lambda op: op.groups > 1 and min(op.channels_in, op.channels_out) < 8,
        reason="TensorRT lacks INT8 tactics for some depthwise and narrow grouped convolutions, and the build "
        "then fails (NVIDIA/TensorRT issues 3385 and 4060); they are bandwidth-bound and gain nothing over FP16",
    ),
    IneligibleOp(
        name="narrow convolution",
        targets=_TENSORRT,
        applies=lambda op: (
            op.op_type.startswith("Conv") and op.groups == 1 and min(op.channels_in, op.channels_out) < 8
        ),
        reason="INT8 tensor cores pad channels to 16 or 32, so a convolution with fewer than 8 input or output "
        "channels, such as the first one, is slower than in FP16 or has no tactic",
    ),
)


def why_ineligible(op: QuantizableOp, target: Target) -> IneligibleOp | None:
    """The first rule by which the target does not run this operator in INT8; None if it is eligible.

    Raises:
        UsageError: it is not a multiply-accumulate operator.
    """
    if op.op_type not in (*QUANTIZABLE_OPS, *FLOAT_ONLY_OPS):
        raise UsageError(f"'{op.op_type}' is not one of {', '.join((*QUANTIZABLE_OPS, *FLOAT_ONLY_OPS))}.")
    return next((rule for rule in INELIGIBLE_OPS if target.name in rule.targets and rule.applies(op)), None)


@dataclass(frozen=True)
class PassThroughOp:
    """An operator without weights: quantized or not, so that the operators around it stay in INT8."""

    op_type: str
    quantized: bool
    reason: str


# For targets on which consecutive operators stay in INT8 (Target.outputs).
PASS_THROUGH_OPS: tuple[PassThroughOp, ...] = (
    PassThroughOp("Relu", True, "replaced by the saturation of the operator before it"),
    PassThroughOp("Clip", True, "replaced by the saturation of the operator before it"),
    PassThroughOp("Add", True, "QLinearAdd"),
    PassThroughOp("Mul", True, "QLinearMul"),
    PassThroughOp("Concat", True, "QLinearConcat"),
    PassThroughOp("MaxPool", True, "runs on bytes unchanged"),
    PassThroughOp("AveragePool", True, "QLinearAveragePool"),
    PassThroughOp("GlobalAveragePool", True, "QLinearGlobalAveragePool"),
    PassThroughOp("Flatten", True, "moves bytes"),
    PassThroughOp("Reshape", True, "moves bytes"),
    PassThroughOp("Transpose", True, "moves bytes"),
    PassThroughOp("Squeeze", True, "moves bytes"),
    PassThroughOp("Unsqueeze", True, "moves bytes"),
    PassThroughOp("Slice", True, "moves bytes"),
    PassThroughOp("Split", True, "moves bytes"),
    PassThroughOp("Sub", False, "no INT8 kernel; here it normalises the float image"),
    PassThroughOp("Div", False, "no INT8 kernel; here it normalises the float image"),
    PassThroughOp("BatchNormalization", False, "no INT8 kernel; one that follows a convolution is folded into it"),
    PassThroughOp("ReduceMean", False, "no INT8 kernel; global means are exported as GlobalAveragePool"),
    PassThroughOp("HardSigmoid", False, "no INT8 kernel"),
    PassThroughOp("HardSwish", False, "no INT8 kernel; ONNX Runtime computes it as HardSigmoid and Mul"),
    PassThroughOp("Sigmoid", False, "8 bits of input range lose its slope; cheap in float"),
    PassThroughOp("Softmax", False, "exponentials need more than 8 bits"),
    PassThroughOp("LayerNormalization", False, "variances need more than 8 bits"),
    PassThroughOp("InstanceNormalization", False, "variances need more than 8 bits"),
    PassThroughOp("GroupNormalization", False, "variances need more than 8 bits"),
    PassThroughOp("Gelu", False, "no INT8 kernel"),
    PassThroughOp("Erf", False, "no INT8 kernel; part of GELU"),
    PassThroughOp("Tanh", False, "8 bits of input range lose its slope; cheap in float"),
    PassThroughOp("LeakyRelu", False, "rare in students; the operators around it stay in INT8"),
    PassThroughOp(
        "Pad", False, "rare in students, whose convolutions do their own padding; the operators around it stay in INT8"
    ),
    PassThroughOp("Resize", False, "rare in classifiers; the operators around it stay in INT8"),
    PassThroughOp("Identity", False, "removed by constant folding"),
    PassThroughOp("Cast", False, "here it converts the bytes of the image to floats"),
)


def quantized_operators(target: Target) -> tuple[str, ...]:
    """Operator types that get Q/DQ on this target."""
    pass_through = (op.op_type for op in PASS_THROUGH_OPS if op.quantized and target.outputs)
    return (*QUANTIZABLE_OPS, *pass_through)
