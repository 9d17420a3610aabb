"""Where a worker computes, and how precisely."""

from __future__ import annotations

import contextlib
import dataclasses
import platform

import torch

from training.presets import Preset


def own_device() -> torch.device:
    """Choose the device of a run without Ray: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def for_device(preset: Preset, device: torch.device) -> Preset:
    """The preset as the device can run it: on a CPU without bfloat16 instructions bfloat16 takes ten times as long as
    float32, and float32 is the more exact. With `frozen_bf16` the memory is worth it."""
    if preset.bf16 and not preset.frozen_bf16 and device.type == "cpu" and not _has_bfloat16():
        print("bf16 is true, but this CPU has no bfloat16 instructions: computing in float32", flush=True)
        return dataclasses.replace(preset, bf16=False)
    return preset


def autocast(preset: Preset, device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if preset.bf16 else contextlib.nullcontext()


def _has_bfloat16() -> bool:
    is_arm = platform.machine() in ("aarch64", "arm64")
    return is_arm or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
