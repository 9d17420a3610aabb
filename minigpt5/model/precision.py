"""The precision that the language model computes in, where nobody names one."""

from __future__ import annotations

from pathlib import Path

from minigpt5.errors import ModelFolderError
from minigpt5.model.quantised import has_codes
from minigpt5.model.quantised_linear import can_multiply_int8
from minigpt5.types import TextPrecision


def choose_precision(base_folder: Path) -> TextPrecision:
    """TODO measured."""
    return "int4" if has_codes(base_folder) else "float32"


def check_precision(precision: TextPrecision, base_folder: Path, *, is_on_cpu: bool) -> None:
    """Raise ModelFolderError where a base model or a device cannot compute in `precision`."""
    if precision == "int4" and is_on_cpu and not has_codes(base_folder):
        raise ModelFolderError(
            f"{base_folder} has no quantised weights, so that int4 cannot be had: use float32, bfloat16 or int8"
        )
    if precision in ("int8", "int4") and not is_on_cpu:
        raise ModelFolderError(f"{precision} weights are for CPUs: on a GPU use bfloat16 or float32")
    if precision == "int8" and not can_multiply_int8():
        raise ModelFolderError("this CPU has no instructions for 8-bit integers (AVX-512 VNNI): use bfloat16 or float32")
