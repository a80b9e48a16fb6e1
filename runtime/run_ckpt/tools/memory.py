"""How much memory a model takes, and how much the process took at its peak."""

import re
import resource
import sys
from pathlib import Path

import torch
from torch import nn


def tensor_nbytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_nbytes(device: str | torch.device) -> int:
    """Return the most memory that was taken: of the GPU by torch, elsewhere of the machine by this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux. Unlike ru_maxrss it does not start at the peak of the process that started this one.
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    # In bytes on macOS, elsewhere in KiB (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
