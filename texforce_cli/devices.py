"""Which device to compute on, and what devices and libraries have each their own way for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from texforce_cli.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch

R = TypeVar("R")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA/ROCm, then Apple's GPU, then the CPU.

    Raises:
        UsageError: a device that torch does not know, that this machine does not have, or that torch cannot compute on.
    """
    import torch

    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # to hold numbers is not enough: a GPU may be too old for this torch
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = asked == "auto" or (name.startswith("cuda") and torch.cuda.is_available())
        reason, others = (f" ({first_line(error)})", "cpu") if there else ("", "cpu or auto")
        raise UsageError(f"the device '{name}' is not available here{reason}", f"use {others}") from error
    if name == "cuda" and (own := torch.cuda.current_device()):
        return torch.device("cuda", own)  # by its number: for another thread of this process `cuda` is the first GPU
    return device


def claim(name: str) -> None:
    """From here on `cuda` without a number is this GPU, in this thread; nothing where `name` has no number."""
    import torch

    if name.startswith("cuda:"):
        torch.cuda.set_device(name)


def claimed() -> str:
    """The GPU that `cuda` without a number is in this thread; "" where there is none."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else ""


def same_bits() -> None:
    """The same command, the same bits, on a CPU too, where several threads may sum in an order of chance; on CUDA as far as
    it has kernels for it that cost little: the gradient of fused attention has none.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # what is never read need not be filled
    warnings.filterwarnings(
        "ignore", r"(Flash|Memory Efficient) attention defaults to a non-deterministic", UserWarning
    )


def keep_memory() -> None:
    """Up to a gigabyte that this process frees it keeps from here on, for its next pass: glibc gives blocks back and has them
    filled with zeros again when it takes them, at every pass through a network. Nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest: only larger blocks are mappings of their own
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


_FULL = (
    "out of memory",  # Apple's GPU
    "unable to find an engine",  # cuDNN: no algorithm has found room for its workspace
    "STATUS_ALLOC_FAILED",  # cuDNN, cuBLAS
    "ALLOCATION_FAILED",  # cuDNN 9
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace is made at the first product
    "Invalid buffer size",  # Apple's GPU: beyond what one buffer may hold
    "can't allocate memory",  # the CPU
)


@contextlib.contextmanager
def full_memory() -> Iterator[None]:
    """Within this block a memory that is full is torch.OutOfMemoryError, whatever a device or library calls it."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(sign in str(error) for sign in _FULL):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def if_room(work: Callable[[], R], *, last: bool = False) -> R | None:
    """What `work` gives; None where the memory is too full for it, and what it has filled is free again.

    Raises:
        torch.OutOfMemoryError: it is too full, and the work is the `last` and smallest that there is to try.
    """
    import torch

    try:
        with full_memory():
            return work()
    except torch.OutOfMemoryError:
        if last:
            raise
    release()  # outside the handler, which holds what was filled
    return None


def release() -> None:
    """Give the memory that torch keeps for later back, so that other processes find it."""
    import torch

    torch.cuda.empty_cache()  # nothing where it computes on none
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def present() -> list[str]:
    """Every device that torch has here, with its name and free memory where it is a CUDA or ROCm GPU."""
    import torch

    found, cpu = [], "cpu (with bf16)" if cpu_computes_bf16() else "cpu"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            free, total = (number / 1e9 for number in torch.cuda.mem_get_info(index))
            memory = f"{free:.1f} of {total:.1f} GB free"
        except RuntimeError as error:  # it may belong to another process alone
            memory = first_line(error)
        found.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {memory})")
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), cpu]


def cpu_computes_bf16() -> bool:
    """Whether torch knows of instructions of the CPU that multiply in bf16; without them it converts back and forth.

    Asked of x86 alone: ARM was not measured.
    """
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has not got it
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def device_memory_gb(device: torch.device) -> float | None:
    """The memory of a CUDA or ROCm GPU in GB; None for other devices."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(device).total_memory) / 1e9


def machine_memory_gb() -> float:
    """The memory of this machine in GB, which its CPU has to itself and Apple's GPUs share with it."""
    import psutil

    return float(psutil.virtual_memory().total) / 1e9
