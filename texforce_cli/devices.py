"""Which device to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from texforce_cli.errors import UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA/ROCm, then Apple's GPU, then the CPU.

    Raises:
        UsageError: a device that torch does not know or this machine does not have.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the device '{name}' is not available here", "use cpu or auto") from error
    return device


def present() -> list[str]:
    """Every device that torch has here, with its name and free memory where it is a CUDA or ROCm GPU."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = (number / 1e9 for number in torch.cuda.mem_get_info(index))
        found.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GB free)")
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def device_memory_gb(device: torch.device) -> float | None:
    """The memory of a CUDA or ROCm GPU in GB; None for other devices."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(device).total_memory) / 1e9
