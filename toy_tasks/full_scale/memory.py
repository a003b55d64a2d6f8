"""Memory: what a run used, and what it will need."""

import resource
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement of the peak anew. On a CPU that is the whole process's, where the system lets it be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """The peak in bytes since the reset: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
