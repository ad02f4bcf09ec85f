"""Software versions and hardware of a run. Imports nothing heavy: versions come from package metadata."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "nayer-edge",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx_cu13",
    "openvino",
    "executorch",
    "torchao",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "litert-torch",
    "numpy",
)


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that affect a run's results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, relevant instruction sets, and usable cores."""
    info = cpu_info()
    flags = info.get("flags", "").split()
    interesting = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": usable_cores(),
        "instructions": [flag for flag in interesting if flag in flags],
    }


def cpu_info() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty if there is no such file."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line.strip():
                break
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    except OSError:
        return {}
    if "Features" in found:
        found.setdefault("flags", found["Features"])
    return found


def usable_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
