"""Backends of the decoder beside eager torch: `python -m benchmarks.backends`, the default request's settings.

Both decoders draw in this process, in turns, the pictures of one and of eight requests at once. Everything counts:
mapper, denoiser, VAE and PNG.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.company import draw
from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.types import DrawRequest, StoryRequest, Vokens

AT_ONCE = (1, 8)


async def write_vokens(folder: Path, num: int) -> list[Vokens]:
    generator = VokenGenerator.from_pretrained(folder)
    found: list[Vokens] = []
    while len(found) < num:
        request = StoryRequest(prompt=("A fox who finds a red balloon",), pages=4, seed=len(found))
        found += [event async for event in generator.generate(request) if isinstance(event, Vokens)]
    return found


def measure(folder: Path, *, turns: int, num_threads: int | None = None) -> dict[str, Any]:
    """Medians of seconds a picture, and the largest differences of pixels in levels."""
    vokens = asyncio.run(write_vokens(folder, max(AT_ONCE)))
    decoders = {
        name: DiffusionDecoder.from_pretrained(folder, backend=name, num_threads=num_threads)
        for name in ("eager", "openvino")
    }
    settings = decoders["eager"].config.default_draw
    seconds: dict[tuple[str, int], list[float]] = {}

    def requests(turn: int, num: int) -> list[DrawRequest]:
        first = 1000 * turn + 10 * num
        return [DrawRequest(vokens=vokens[n], seed=first + n, settings=settings) for n in range(num)]

    async def together(decoder: DiffusionDecoder, asked: Sequence[DrawRequest]) -> list[np.ndarray]:
        return list(await asyncio.gather(*(draw(decoder, request) for request in asked)))

    drawn: dict[str, list[np.ndarray]] = {}
    for turn in range(turns + 1):  # the first one warms up
        for num in AT_ONCE:
            for name, decoder in decoders.items():
                began = time.perf_counter()
                drawn[name] = asyncio.run(together(decoder, requests(turn, num)))
                if turn:
                    seconds.setdefault((name, num), []).append((time.perf_counter() - began) / num)
    fresh = DiffusionDecoder.from_pretrained(folder, backend="openvino", num_threads=num_threads)
    alone = [asyncio.run(draw(fresh, request)) for request in requests(turns, max(AT_ONCE))]
    medians = {key: float(np.median(values)) for key, values in seconds.items()}
    return {
        "seconds_a_picture": {f"{name}, {num} at once": value for (name, num), value in medians.items()},
        "ratios": {
            f"picture_seconds_{num}_vs_eager": medians["openvino", num] / medians["eager", num] for num in AT_ONCE
        },
        "largest_difference_from_eager_levels": _levels(drawn["openvino"], drawn["eager"]),
        "largest_difference_alone_levels": _levels(drawn["openvino"], alone),
    }


def _levels(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
    return max(int(np.abs(one - other).max()) for one, other in zip(ones, others, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of each decoder; as many as cores where it is not given")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.model, turns=options.turns, num_threads=options.threads), indent=2))


if __name__ == "__main__":
    main()
