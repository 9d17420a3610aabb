"""Numbers that a lower precision would spoil."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast, on a device that has it."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
