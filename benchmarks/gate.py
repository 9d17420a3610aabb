"""Whether a change has made the shipped model worse: `python -m benchmarks.gate [--noise 5]`.

The model draws captions of held-out pairs, tells stories from held-out prompts, draws pages that only refer to what
they show, and describes scenes: the questions of benchmarks/quality.py, fewer of them. `--noise` asks all of them
several times, with other noise for the pictures and other draws for the texts, and notes in results/gate.json what the
figures do by themselves. Without it they are asked once: a figure that is lower than that noise allows ends the command
with status 1. On the machine that measured the noise an unchanged model gives the first of its values again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.drawing import draw, own_size
from benchmarks.quality import STORY_FACTS, accuracy, ask, crisp, machine, rights, understanding
from benchmarks.referring import VOKENS, reference
from benchmarks.stories import summary, tell
from minigpt5.config import default_model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.scorer import Scorer, load_scorer

RESULTS = Path(__file__).parent / "results" / "gate.json"
SEEDS_APART = 100_000
"""Between the first seeds of two rounds: more than a round uses."""
DEVIATIONS = 3.0
"""Standard deviations over rounds that a figure may lie under its mean."""
ANSWERS = 1.5
"""So many answers of a figure may be wrong for nothing: few rounds may agree by chance."""
LEAST_ANSWERS = 0.5
"""Share of the known answers that a figure has to rest on: a model that says nothing says nothing wrong."""
NOTHING = {"share": 0.0, "num": 0.0}
"""A fact that no page has said."""


@dataclass(frozen=True, kw_only=True)
class Nums:
    """Numbers of what is asked."""

    captions: int = 120
    stories: int = 10
    references: int = 12
    scenes: int = 32


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The higher, the better."""

    value: float
    num: int
    """Answers that it counts, or values that it averages."""


def measure(
    model: MiniGPT5, scorer: Scorer, text_encoder: nn.Module, nums: Nums, first_seed: int = 0
) -> dict[str, Figure]:
    """All figures of one round, whose pictures and texts have the seeds from `first_seed` on."""
    asked = ask(nums.captions, held_out_pairs=True, first_seed=first_seed)
    drawn = draw(model, [one.caption for one in asked], own_size(model), seeds=[one.seed for one in asked])
    shown = accuracy(rights(scorer, drawn, asked))
    told = summary(tell(model, scorer, nums.stories, first_seed=first_seed))
    referring = reference(model, scorer, text_encoder, nums.references, ways=[VOKENS], first_seed=first_seed)
    said = understanding(model, nums.scenes)
    found: dict[str, Mapping[str, float]] = {
        **{f"caption: the picture shows {fact}": share for fact, share in shown.items()},
        "caption: crispness": crisp(drawn, asked)["both"],
        **{f"story: a page shows {fact}": told["pictures"].get(fact, NOTHING) for fact in STORY_FACTS},
        "story: the prompt's cast": told["stories_with_the_prompts_cast"],
        "story: all pages and pictures": told["stories_with_all_pages_and_pictures"],
        "story: facts that a page refers to": referring[VOKENS]["referred_to"]["all"],
        **{f"description: {fact}": said[fact] for fact in STORY_FACTS},
    }
    return {
        name: Figure(value=one["share"] if "share" in one else one["mean"], num=int(one["num"]))
        for name, one in found.items()
    }


def noise(rounds: Sequence[Mapping[str, Figure]]) -> dict[str, dict[str, object]]:
    """By figure: its values in all rounds, their mean and standard deviation, and the least that the gate lets pass."""
    found: dict[str, dict[str, object]] = {}
    for name, first in rounds[0].items():
        values = [one[name].value for one in rounds]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        least = mean - max(DEVIATIONS * deviation, ANSWERS / max(1, first.num))
        found[name] = {
            "mean": round(mean, 4),
            "deviation": round(deviation, 4),
            "least": round(least, 4),
            "num": first.num,
            "values": values,
        }
    return found


def worse(figures: Mapping[str, Figure], known: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of the figures that are lower than the noise allows, or rest on far fewer answers.

    Raises ValueError where figures and noise do not have the same names: the noise has to be measured again."""
    if set(figures) != set(known):
        differing = ", ".join(sorted(set(figures) ^ set(known)))
        raise ValueError(f"figures and {RESULTS.name} differ in {differing}: run python -m benchmarks.gate --noise 5")
    return [name for name, one in figures.items() if _is_worse(one, known[name])]


def _is_worse(figure: Figure, known: Mapping[str, float]) -> bool:
    return not (figure.value >= known["least"] and figure.num >= LEAST_ANSWERS * known["num"])


def to_text(figures: Mapping[str, Figure], known: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each figure."""
    lines = [f"{'':<38} {'now':>7} {'mean':>7} {'noise':>7} {'least':>7} {'answers':>8}"]
    for name, one in figures.items():
        mean, deviation, least = (known[name][key] for key in ("mean", "deviation", "least"))
        mark = "  WORSE" if _is_worse(one, known[name]) else ""
        lines.append(f"{name:<38} {one.value:>7.3f} {mean:>7.3f} {deviation:>7.4f} {least:>7.3f} {one.num:>8}{mark}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--noise", type=int, default=0, metavar="ROUNDS", help="measure the noise in so many rounds")
    parser.add_argument("--known", type=Path, default=RESULTS, help="where the noise is (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.noise < 0 or options.noise == 1:
        parser.error(f"--noise is {options.noise} but must be 2 or more: one round has no spread")
    model, scorer = MiniGPT5.from_pretrained(options.model), load_scorer()
    text_encoder = load_text_encoder(resolve(model.config.text_encoder), model.config)
    start = time.monotonic()
    rounds = []
    for number in range(max(1, options.noise)):
        rounds.append(measure(model, scorer, text_encoder, Nums(), number * SEEDS_APART))
        print(f"round {number + 1} ends after {time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.noise:
        given = sys.argv[1:] if arguments is None else arguments
        report = {
            "ratios": {},
            "figures": noise(rounds),
            "fingerprint": model.config.fingerprint,
            "seconds_a_round": round((time.monotonic() - start) / options.noise),
            "machine": machine(),
            "command": " ".join(["python -m benchmarks.gate", *given]),
        }
        options.known.write_text(json.dumps(report, indent=2) + "\n")
        return 0
    report = json.loads(options.known.read_text())
    known = report["figures"]
    if report["fingerprint"] != model.config.fingerprint:
        print("the noise is of other weights; once these are to be kept: python -m benchmarks.gate --noise 3")
    failed = worse(rounds[0], known)
    print(to_text(rounds[0], known))
    print(f"worse than the noise allows: {', '.join(failed)}" if failed else "no figure is worse than the noise allows")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
