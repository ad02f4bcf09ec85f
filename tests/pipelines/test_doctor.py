"""`doctor`: what it says is what other tools say, with the base install alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.pipelines import doctor
from nayer_edge.pipelines.doctor import EXTRAS, Gpu, Line, examine

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def found() -> dict[str, Line]:
    return {line.what: line for line in examine()}


def test_groups_and_lines(found: dict[str, Line]) -> None:
    assert list(dict.fromkeys(line.group for line in found.values())) == [
        "machine",
        "gpu",
        "packages",
        "targets",
        "extras",
    ]
    assert {"processor", "INT8 instructions", "bf16 instructions", "memory", "disk", "torch", "onnxruntime"} <= set(
        found
    )
    assert {f"target {name}" for name in ("cpu", "arm", "tensorrt", "tensorrt-rtx")} <= set(found)
    assert all(line.fix or line.ok or line.group in ("gpu", "extras", "targets") for line in found.values())


def test_packages_and_providers_are_those_of_the_environment(found: dict[str, Line]) -> None:
    import onnxruntime

    assert found["torch"].found.startswith(metadata.version("torch"))
    told = found["onnxruntime"].found.partition("providers: ")[2].split(", ")
    assert [f"{name}ExecutionProvider" for name in told] == onnxruntime.get_available_providers()


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert doctor._torch_cuda() == (torch.version.cuda or "")


def test_memory_is_the_systems() -> None:
    total, free = doctor.memory_gib()
    assert total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, rel=0.01)
    assert 0 < free <= total


def test_extras_are_those_of_the_package(found: dict[str, Line]) -> None:
    declared = set(metadata.metadata("nayer-edge").get_all("Provides-Extra") or [])
    assert set(EXTRAS) == declared - {"dev"}
    for extra in EXTRAS:
        line = found[f"extra {extra}"]
        assert line.ok or f"pip install '.[{extra}]'" in line.fix or "not needed" in line.found


def test_a_package_that_is_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Line]
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("timm", "tensorrt_rtx_cu13") else real(name))
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('a library is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = {line.what: line for line in examine()}
    assert (lines["timm"].ok, lines["timm"].fix) == (False, "pip install '.[timm]'")
    assert lines["extra timm"].found.endswith("missing: timm")
    assert not lines["target tensorrt-rtx"].ok
    assert "cannot be imported: ImportError: a library is missing" in lines["onnxruntime"].found


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Described by what its driver would say; a build of torch and ONNX Runtime for processors is noticed."""
    monkeypatch.setattr(doctor, "gpus", lambda: [Gpu("Some GPU", 79.6, (9, 0)), Gpu("An older one", 15.8, (7, 5))])
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "")
    lines = {line.what: line for line in examine()}
    assert lines["CUDA device 0"].found == "Some GPU, 80 GiB, sm90, bf16"
    assert lines["CUDA device 1"].found == "An older one, 16 GiB, sm75, no bf16"
    assert not lines["torch on the GPU"].ok
    if "CUDA" not in lines["onnxruntime"].found:
        assert ".[gpu]" in lines["onnxruntime on the GPU"].fix
    monkeypatch.setattr(doctor, "gpus", list)
    assert "no device" in {line.what: line for line in examine()}["CUDA devices"].found


@pytest.mark.gpu
def test_the_driver_and_torch_see_the_same_devices() -> None:
    import torch

    seen = doctor.gpus()
    assert seen is not None
    assert [gpu.name for gpu in seen] == [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    assert [gpu.capability for gpu in seen] == [torch.cuda.get_device_capability(n) for n in range(len(seen))]
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert seen[0].gib == pytest.approx(total, rel=0.05)


def test_it_needs_the_base_install_alone(spawn: Invoke, without: Callable[..., dict[str, str]]) -> None:
    answer = spawn("doctor", "--json", env=without())
    assert (answer.code, answer.err) == (0, "")
    lines = {line["what"]: line for line in json.loads(answer.out)}
    assert "cannot be imported" in lines["onnxruntime"]["found"], "it is installed, and blocked"
    assert set(lines["processor"]) == {"group", "what", "ok", "found", "fix"}


def test_nothing_heavy_is_loaded() -> None:
    program = (
        "import sys\nfrom nayer_edge.pipelines.doctor import examine\nexamine()\n"
        "assert not {'torch', 'numpy', 'onnxruntime', 'onnx', 'tensorrt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_fixes_are_commands_of_extras_that_exist(found: dict[str, Line]) -> None:
    declared = set(metadata.metadata("nayer-edge").get_all("Provides-Extra") or [])
    for line in found.values():
        for name in re.findall(r"\.\[([a-z]+)\]", line.fix):
            assert name in declared
