"""From base models and your own rows to a model that is served: `python examples/own_model/walk.py [FOLDER]`.

It runs the commands of docs/own-models.md one after another, on tiny random base models and a few rows. Give `main` of
each command your own models and data, or type the same commands on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from batch_jobs import illustrate, precompute, prepare
from minigpt5 import MiniGPT5, new
from training import train

sys.path.insert(0, str(Path(__file__).parent))
from tiny_bases import make_bases  # noqa: E402 (beside this file)

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}
STEPS = ["--workers", "0", "steps=2", "batch_size=2", "warmup_steps=1", "validation_batches=0"]


def make_rows(folder: Path, *, num: int = 24) -> None:
    """Stories of two pages, a line each in story.jsonl, with a picture for each page beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(num):
        pages = []
        for page, colour in enumerate(rng.choice(list(COLOURS), 2)):
            Image.new("RGB", (48, 32), COLOURS[colour]).save(folder / f"{number}-{page}.png")
            pages.append({"text": f"A {colour} field.", "picture": f"{number}-{page}.png"})
        lines.append(json.dumps({"id": f"field-{number}", "prompt": "Tell me of fields.", "pages": pages}))
    (folder / "story.jsonl").write_text("\n".join(lines))


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def walk(folder: Path) -> Path:
    """Make bases, rows, a new folder, train it in both stages and distill it; returns the finished model folder."""
    bases, model = make_bases(folder / "bases"), folder / "new"
    before = hash_files(folder / "bases")
    make_rows(folder / "data")
    rows, encoded, vision, align, learn, distill = (
        str(folder / name) for name in ("rows", "encoded", "vision", "align", "learn", "distill")
    )
    places = [word for name, place in bases.items() for word in (f"--{name}", str(place))]
    commands = (
        (prepare.main, ["folder", str(folder / "data"), "--output", rows]),
        (new.main, [*places, "--context", "512", "--out", str(model)]),
        (precompute.main, [rows, "--model", str(model), "--output", encoded]),
        (train.main, ["vision", "--data", encoded, "--start", str(model), "--out", vision, *STEPS]),
        (
            train.main,
            ["align", "--data", encoded, "--start", f"{vision}/model", "--out", align, "draws_samples=false", *STEPS],
        ),
        (
            train.main,
            ["learn", "--data", encoded, "--start", f"{align}/model", "--out", learn, "story_share=0.5", *STEPS],
        ),
        (
            train.main,
            ["distill", "--data", encoded, "--start", f"{learn}/model", "--out", distill, "teacher_steps=2", *STEPS],
        ),
    )
    for main, arguments in commands:
        if code := main(arguments):
            sys.exit(code)
    assert hash_files(folder / "bases") == before, "base models are read and never written"
    return Path(distill) / "model"


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own")
    finished = walk(place)
    story = MiniGPT5.from_pretrained(finished).write("Tell me of fields.", pages=2, seed=7)
    print(f"wrote {story.save(place / 'story.html')}")
    (place / "prompts.jsonl").write_text(json.dumps({"id": "one", "prompt": "Tell me of fields.", "pages": 1}))
    outputs = ["--output", str(place / "books"), "--model", str(finished)]
    if code := illustrate.main([str(place / "prompts.jsonl"), *outputs]):
        sys.exit(code)
    print(f"serve it: make serve MODEL={finished}")
