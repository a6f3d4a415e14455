"""Gather once, reduce once. Everything is decided when called: without a process group of several ranks these are identities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_active() -> bool:
    """Whether a process group of more than one rank exists at this moment."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_active() else 0
