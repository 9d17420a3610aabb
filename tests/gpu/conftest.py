"""Tests of what only a GPU shows. Each is skipped where there is none; many are followed on the CPU as well."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are: `gpu`, or `gpu(2)`."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        if mark := item.get_closest_marker("gpu"):
            needed = mark.args[0] if mark.args else 1
            if num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, and torch sees {num_gpus}"))
