"""Libraries' memory and disk errors become errors that the user can act on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from nayer_edge.errors import MissingError, UsageError, hidden_memory_error, resource_error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("unable to mmap 316652 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)  # fmt: skip
def test_memory(error: Exception) -> None:
    found = resource_error(error)
    assert isinstance(found, MissingError)
    assert "memory" in found.what
    assert "bank_mib" in found.fix


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_disk_errors_behind_other_errors(number: int) -> None:
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise ValueError("the optimised model cannot be read") from None
    except ValueError as error:
        found = resource_error(error)
    assert isinstance(found, UsageError)
    assert os.strerror(number) in found.why
    assert "TMPDIR" in found.fix


def test_a_memory_error_hidden_behind_another_error() -> None:
    for cause, wanted in ((RuntimeError("could not create a primitive"), True), (RuntimeError("shapes differ"), False)):
        try:
            raise UsageError("The model does not take such images.") from cause
        except UsageError as error:
            found = hidden_memory_error(error)
        assert (found is not None) == wanted
        assert found is None or found.why == f"{cause}"


def test_other_errors_are_not_explained_away() -> None:
    for error in (
        ValueError("x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOENT, "x"),
    ):
        assert resource_error(error) is None


@pytest.mark.slow
def test_torch_without_memory() -> None:
    """With the real message of the installed PyTorch."""
    program = """
import resource, torch
from nayer_edge.errors import resource_error
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(2**30, dtype=torch.uint8)
except Exception as error:
    print(type(resource_error(error)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "MissingError\n", done.stderr
