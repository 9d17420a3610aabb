"""A model from base models and data that packages carry: `python examples/own_model/from_packages.py [FOLDER]`.

SmolLM2 writes, EfficientNet reads pictures, and the VAE and the UNet of the shipped model draw. What lies between them
is new: it learns from stamps with captions, and then from campaigns, stories with a painting on their pages. Every step
is a command of docs/own-models.md, and the same command resumes after a stop. FOLDER/report.html shows what came out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from packaged_bases import STAMPS, WESNOTH, fetch_data, make_diffusion_base  # noqa: E402 (beside this file)
from packaged_report import write_page  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS = {"vision": 40, "align": 400, "learn": 40}
"""Optimizer steps of each stage."""
BATCH = {"vision": 8, "align": 16, "learn": 2}
DRAWS = ["caption_weight=1.0", "picture_weight=0.1", "samples_latents=false"]
"""The caption's own states teach the mapper more than the picture does: the frozen UNet knows such states, and no such
pictures."""
RATES = {
    "vision": ["learning_rate=3e-4"],
    "align": ["mapper_learning_rate=1e-3", "voken_learning_rate=3e-3", *DRAWS],
    "learn": ["learning_rate=2e-4", "mapper_learning_rate=1e-4", "voken_learning_rate=5e-4", "text_weight=0.3", *DRAWS],
}
"""Larger than the published ones, which are for thousands of steps."""
SETTINGS = [
    "bf16=false",
    "gradient_accumulation_steps=1",
    "warmup_steps=20",
    "max_grad_norm=1.0",
    "validation_batches=4",
    "checkpoint_every_s=300",
    "log_every=5",
]
PAGES = ["A red apple.", "A sailing boat.", "A green frog.", "A castle.", "A yellow car.", "A brown owl."]
PROMPTS = ["An old king leads his people over the sea.", "A fox who finds a balloon"]
DRAW = {"steps": 30, "guidance_scale": 3.0, "seed": 7}


@dataclass(frozen=True)
class Step:
    """One command: a name, a module of `python -m`, and its arguments."""

    name: str
    module: str
    arguments: list[str]


def plan(place: Path, data: Path, *, scale: float = 1.0, workers: int = 1, threads: int = 2) -> list[Step]:
    """All commands, in order; `scale` multiplies the steps of training, by so many workers of so many threads."""
    model, rows, books = (str(place / name) for name in ("new", "rows", "books"))
    bases = ["--language", "smollm2-135m-instruct", "--vision", "efficientnet-lite0"]
    bases += ["--diffusion", str(place / "diffusion"), "--condition", "32", "--context", "1536"]
    steps = [
        Step("prepare stamps", "batch_jobs.prepare", ["tuxpaint", str(data / STAMPS), "--output", f"{rows}/stamps"]),
        Step("prepare tales", "batch_jobs.prepare", ["wesnoth", str(data / WESNOTH), "--output", f"{rows}/tales"]),
        Step("new", "minigpt5.new", [*bases, "--out", model]),
    ]
    for name, stages in (("stamps", ["vision", "align"]), ("tales", ["learn"])):
        arguments = [f"{rows}/{name}", "--model", model, "--output", f"{rows}/{name}-encoded", "--threads", "2"]
        steps.append(Step(f"precompute {name}", "batch_jobs.precompute", [*arguments, "--stages", *stages]))
    start = model
    for stage in STEPS:
        encoded, out = f"{rows}/{'tales' if stage == 'learn' else 'stamps'}-encoded", str(place / stage)
        settings = [f"steps={max(2, round(scale * STEPS[stage]))}", f"batch_size={BATCH[stage]}"]
        arguments = [stage, "--data", encoded, "--start", start, "--out", out, "--workers", str(workers)]
        arguments += [*settings, f"num_threads={threads}", *SETTINGS, *RATES[stage]]
        steps.append(Step(stage, "training.train", arguments))
        start = f"{out}/model"
    arguments = [str(place / "prompts.jsonl"), "--model", start, "--output", books, "--books"]
    return [*steps, Step("illustrate", "batch_jobs.illustrate", arguments)]


def write_prompts(path: Path) -> None:
    rows = [{"id": "captions", "pages_text": PAGES, **DRAW}]
    rows += [{"id": f"story-{number}", "prompt": words, "pages": 3, **DRAW} for number, words in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(step: Step, done: Path) -> None:
    """Run a command, unless an earlier call has finished it, and note its seconds. Exits where it fails."""
    if done.exists():
        return
    print(f"python -m {step.module} {' '.join(step.arguments)}", flush=True)
    began = time.monotonic()
    if code := subprocess.run([sys.executable, "-m", step.module, *step.arguments], cwd=ROOT).returncode:
        sys.exit(code)
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps({"seconds": round(time.monotonic() - began, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/from-packages"))
    parser.add_argument("--data", type=Path, help="the unpacked Debian packages (default: FOLDER/data, downloaded)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of training (default 1)")
    parser.add_argument("--workers", type=int, default=1, help="0: training without Ray (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of a worker (default %(default)s)")
    options = parser.parse_args()
    place = options.folder.absolute()
    place.mkdir(parents=True, exist_ok=True)
    data = (options.data or place / "data").absolute()
    fetch_data(data)
    make_diffusion_base(place / "diffusion")
    write_prompts(place / "prompts.jsonl")
    steps = plan(place, data, scale=options.scale, workers=options.workers, threads=options.threads)
    for step in steps:
        run(step, place / "done" / f"{step.name.replace(' ', '-')}.json")
    print(f"wrote {write_page(place, list(STEPS))}")


if __name__ == "__main__":
    main()
