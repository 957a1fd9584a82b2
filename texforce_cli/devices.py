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


def device_memory_gb(device: torch.device) -> float | None:
    """The memory of a CUDA or ROCm GPU in GB; None for other devices."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(device).total_memory) / 1e9
