"""vLLM behind the generator's face beside the torch engine: `python -m benchmarks.vllm`, which `make test-vllm` runs.

Both engines write the same requests of all three modes greedily in float32, each in its own environment: texts, states
and pictures are compared. Then vLLM alone: sampled requests alone and in company, cancelled ones, a refused one. Then
the speed of both, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load import WHAT, WHO
from benchmarks.quality import machine
from benchmarks.turns import Program, running
from minigpt5.codec import to_json
from minigpt5.config import ModelConfig, default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.vllm.export import export
from minigpt5.engine.vllm.exported import load_export
from minigpt5.engine.vllm.settings import VLLM_PYTHON
from minigpt5.errors import ModelFolderError
from minigpt5.model.folder_config import load_config
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.types import DrawRequest, InputImage, Page, Picture, Sampling, StoryRequest, Vokens

EXPORT = Path(__file__).parent.parent / "build" / "vllm-float32"
GREEDY = Sampling(temperature=0.0, max_page_tokens=48)
NUM_SAMPLED = 4


def find_export(model: Path) -> Path:
    """A float32 export of a model in `build/`, made now where there is none."""
    try:
        load_export(EXPORT, load_config(model))
    except ModelFolderError:
        shutil.rmtree(EXPORT, ignore_errors=True)
        export(model, EXPORT, dtype="float32")
    return EXPORT


def new_requests(num: int) -> list[StoryRequest]:
    """Stories, replies and captions by turns; some with stop strings, given texts, forced pictures and pictures in the
    prompt, or read back."""
    return [_new_request(index) for index in range(num)]


def _new_request(index: int) -> StoryRequest:
    who, what = WHO[index % len(WHO)], WHAT[index * 5 % len(WHAT)]
    words, like = f"A {who} who finds a {what}", {"seed": index, "sampling": GREEDY}
    match index % 10:
        case 0 | 1 | 2:
            return StoryRequest(prompt=(words,), pages=2, **like)  # type: ignore[arg-type]
        case 3:
            return StoryRequest(prompt=(words,), pages=2, given=(f"A {who} went for a walk.",), **like)  # type: ignore[arg-type]
        case 4:
            return StoryRequest(prompt=(words, _picture(index)), pages=1, **like)  # type: ignore[arg-type]
        case 5:
            page = Page(index=1, text=f"A {who} saw a {what}.", picture=_drawn(index))
            return StoryRequest(prompt=(words,), pages=1, previous=(page,), feedback="pictures", **like)  # type: ignore[arg-type]
        case 6:
            return StoryRequest(prompt=(f"Tell me of a {who}.",), mode="reply", pages=1, pictures="forced", **like)  # type: ignore[arg-type]
        case 7:
            return StoryRequest(prompt=(_picture(index), "Describe this image."), mode="reply", pages=1, **like)  # type: ignore[arg-type]
        case 8:
            return StoryRequest(prompt=(f"A {who} and a {what}",), mode="reply", pages=2, stop=(". ",), **like)  # type: ignore[arg-type]
        case _:
            return StoryRequest(prompt=(f"a {who} and a {what} at night",), mode="caption", pages=1, **like)  # type: ignore[arg-type]


def _png(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_scene(scene_at(index, seed=3))).save(file, "PNG")
    return file.getvalue()


def _picture(index: int) -> InputImage:
    return InputImage(data=_png(index))


def _drawn(index: int) -> Picture:
    return Picture(page=1, png=_png(index), width=128, height=128, seed=1, denoise_steps=1)


def sampled_requests(config: ModelConfig) -> list[StoryRequest]:
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(config.sampling, max_page_tokens=24))
        for request in new_requests(NUM_SAMPLED)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likeness:
    """How much alike two engines' answers are."""

    num_texts: int
    num_equal: int
    num_close: int
    """Requests whose text differs after a choice that was close in the torch engine."""
    states_deviation: float
    """Largest, of the pictures before which both wrote the same."""
    largest_state: float
    pairs: list[tuple[Vokens, Vokens]]
    """States of the same picture by both."""


def compare(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], config: ModelConfig) -> Likeness:
    """Answers of the torch engine and of vLLM to the same requests."""
    pairs, num_equal, num_close = [], 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        is_equal = mine["texts"] == other["texts"] and mine["states"].keys() == other["states"].keys()
        num_equal += is_equal
        num_close += not is_equal and mine["close"] > 0
        if not is_equal:
            print(f"differs after {mine['close']} close choices: {mine['texts']} {other['texts']}", flush=True)
            continue
        pairs += [
            (_vokens(page, mine["states"][page], config), _vokens(page, other["states"][page], config))
            for page in mine["states"]
        ]
    deviations = [float(np.abs(mine.hidden_VH - other.hidden_VH).max()) for mine, other in pairs]
    return Likeness(
        num_texts=len(ours),
        num_equal=num_equal,
        num_close=num_close,
        states_deviation=max(deviations),
        largest_state=max(float(np.abs(mine.hidden_VH).max()) for mine, _ in pairs),
        pairs=pairs,
    )


def _vokens(page: str, states: str, config: ModelConfig) -> Vokens:
    hidden_VH = np.frombuffer(base64.b64decode(states), np.float32).reshape(config.num_vokens, config.hidden)
    return Vokens(page=int(page), hidden_VH=hidden_VH, fingerprint=config.fingerprint)


def compare_pictures(model: Path, pairs: Sequence[tuple[Vokens, Vokens]], config: ModelConfig) -> int:
    """Largest difference of a pixel, in levels of 255, between the pictures of both engines' states."""
    decoder = DiffusionDecoder.from_pretrained(model, num_threads=1)

    async def draw(vokens: Vokens) -> np.ndarray:
        request = DrawRequest(vokens=vokens, seed=5, settings=config.default_draw)
        events = [event async for event in decoder.decode(request)]
        assert isinstance(events[-1], Picture)
        return np.asarray(Image.open(io.BytesIO(events[-1].png)), dtype=int)

    async def largest() -> int:
        return max([int(np.abs(await draw(mine) - await draw(other)).max()) for mine, other in pairs])

    return asyncio.run(largest())


def measure(model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = load_config(model)
    given = [str(model), str(folder), "1"]
    with (
        running([sys.executable, "-m", "benchmarks.writer", "torch", *given]) as torch_engine,
        running([str(options.python), "-m", "benchmarks.writer", "vllm", *given]) as vllm_engine,
    ):
        asked = [to_json(request) for request in new_requests(options.requests)]
        ours = torch_engine.measure("write", requests=asked, at_once=False)
        likeness = compare(ours, vllm_engine.measure("write", requests=asked, at_once=True), config)
        print(f"{likeness.num_equal} of {likeness.num_texts} texts equal, {likeness.num_close} after a close choice")
        print(f"states within {likeness.states_deviation:.1e}, the largest is {likeness.largest_state:.1f}", flush=True)
        same = count_same(vllm_engine, [to_json(request) for request in sampled_requests(config)], asked)
        left = vllm_engine.measure("cancel", num=options.cancels, seed=1)
        refused = vllm_engine.measure("refuse")
        print(
            f"{same} of {NUM_SAMPLED} sampled alike in company; left of cancels: {left}; refused: {refused}", flush=True
        )
        assert refused
        speed = {
            str(num): {
                name: engine.measure("speed", num=num, tokens=options.tokens)
                for name, engine in (("torch", torch_engine), ("vllm", vllm_engine))
            }
            for num in options.rows
        }
        death = vllm_engine.measure("die")
        print(f"killed under a story: {death}", flush=True)
        assert death["error"] and death["told"] == 1 and not death["processes_left"]
        versions = [engine.measure("version") for engine in (torch_engine, vllm_engine)]
    return {
        "likeness": {name: value for name, value in vars(likeness).items() if name != "pairs"},
        "pictures_levels": compare_pictures(model, likeness.pairs[:: options.every], config),
        "sampled_alike_in_company": f"{same} of {NUM_SAMPLED}",
        "cancels": {"num": options.cancels, "left": left},
        "refused": refused,
        "death": death,
        "speed": speed,
        "versions": versions,
    }


def count_same(engine: Program, sampled: list[Any], company: list[Any]) -> int:
    """Sampled requests whose text is the same alone and among others."""
    alone = engine.measure("write", requests=sampled, at_once=False)
    together = engine.measure("write", requests=[*sampled, *company[:10]], at_once=True)
    return sum(one["texts"] == other["texts"] for one, other in zip(alone, together, strict=False))


def ratios_of(figures: Mapping[str, Any]) -> dict[str, float]:
    likeness, speed = figures["likeness"], figures["speed"]
    ratios: dict[str, float] = {
        "texts_equal": round((likeness["num_equal"] + likeness["num_close"]) / likeness["num_texts"], 3),
        "states_deviation": likeness["states_deviation"],
        "pictures_levels": figures["pictures_levels"],
        "cancels_left": sum(figures["cancels"]["left"].values()),
    }
    if rates := speed.get("16"):
        rate = rates["vllm"]["tokens_per_s"] / rates["torch"]["tokens_per_s"]
        ratios["tokens_16_vs_torch"] = round(rate, 2)
    return ratios


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--export", type=Path, help="float32 export of the model (default: in build/)")
    parser.add_argument("--python", type=Path, default=VLLM_PYTHON, help="interpreter with vLLM (default %(default)s)")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--every", type=int, default=5, help="of so many states one is drawn (default %(default)s)")
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=24, help="of each text whose speed is measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "vllm.json")
    options = parser.parse_args(arguments)
    figures = measure(options.model, options.export or find_export(options.model), options)
    for num, rates in figures["speed"].items():
        for name, rate in rates.items():
            print(f"{num:>3} rows, {name:5} {rate['tokens_per_s']:8.1f} tokens/s {rate['states_per_s']:7.2f} states/s")
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "ratios": ratios_of(figures),
        "figures": figures,
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.vllm", *given]),
    }
    print(json.dumps(report["ratios"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    found = report["ratios"]
    is_good = (
        found["texts_equal"] == 1 and found["states_deviation"] <= 1e-4 and found["pictures_levels"] <= 1
    ) and not found["cancels_left"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
