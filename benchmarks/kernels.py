"""Which way of computing the UNet is quickest here: `python -m benchmarks.kernels [--compile]`.

Milliseconds a sample, by batch size: memory format, fused projections, bfloat16, compiled. What it shows is what the
engines' defaults were chosen by.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import machine
from minigpt5.config import default_model_folder
from minigpt5.model.folder import load_decoder_model

BATCH_SIZES = (2, 4, 8, 16)
REPEATS = 5
SECONDS = 0.6

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure_one(predict: Predict, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """The median of some repeats, in milliseconds a sample."""
    predict(*inputs)
    times = []
    for _ in range(REPEATS):
        num, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            predict(*inputs)
            num += 1
        times.append((time.perf_counter() - began) / num / len(inputs[0]))
    return 1000 * float(np.median(times))


@torch.no_grad()
def measure(folder: Path, *, is_compiled: bool) -> dict[str, dict[str, float]]:
    """By way, then by batch size."""
    config, _, diffusion = load_decoder_model(folder)
    plain = diffusion.denoiser
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fused.fuse_qkv_projections()

    def call(unet: torch.nn.Module, *, is_bf16: bool = False) -> Predict:
        def predict(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
                return unet(latents, timesteps, encoder_hidden_states=condition).sample

        return predict

    ways = {
        "float32": call(plain),
        "channels last": call(last),
        "fused projections": call(fused),
        "bfloat16": call(plain, is_bf16=True),
        "bfloat16, channels last": call(last, is_bf16=True),
    }
    if is_compiled:
        ways["compiled"] = call(torch.compile(plain))  # type: ignore[arg-type]
    size = plain.config.sample_size
    figures: dict[str, dict[str, float]] = {name: {} for name in ways}
    for num in BATCH_SIZES:
        inputs = (
            torch.randn(num, plain.config.in_channels, size, size),
            torch.full((num,), 500),
            torch.randn(num, config.condition_length, config.condition_width),
        )
        for name, predict in ways.items():
            figures[name][str(num)] = round(measure_one(predict, inputs), 2)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which needs a C++ compiler")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "kernels.json")
    options = parser.parse_args(arguments)
    by_threads = {}
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        by_threads[str(num_threads)] = measure(options.model, is_compiled=options.compile)
        print(f"{num_threads} threads, ms a sample    " + "".join(f"{num:>8}" for num in BATCH_SIZES))
        for name, row in by_threads[str(num_threads)].items():
            print(f"  {name:<24}" + "".join(f"{row[str(num)]:8.2f}" for num in BATCH_SIZES), flush=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.kernels", *given])
    figures = {"unet_ms_a_sample_by_threads": by_threads}
    report = {"ratios": {}, "figures": figures, "machine": machine(), "command": command}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
