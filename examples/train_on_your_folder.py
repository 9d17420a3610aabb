"""Fine-tune the shipped model on a folder of captioned pictures: `python examples/train_on_your_folder.py [FOLDER]`.

A second argument is the number of steps. `make_data` stands for your own folder: a story.jsonl, a row a line, and the
pictures that it names. On a cluster, submit the same three commands with `ray job submit`, and give the last one
`--workers` and `--gpus`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from batch_jobs import precompute, prepare
from minigpt5.config import default_model_folder
from minigpt5.storybook.captions import Facts, canonical_caption
from minigpt5.storybook.scenes import draw_scene, scene_at
from training import train


def make_data(folder: Path, *, num: int = 120) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num):
        scene = scene_at(index, seed=5)
        Image.fromarray(draw_scene(scene)).save(folder / f"{index}.png")
        lines.append(json.dumps({"caption": canonical_caption(Facts.of(scene)), "picture": f"{index}.png"}))
    (folder / "story.jsonl").write_text("\n".join(lines))


if __name__ == "__main__":
    runs, steps = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/mine"), sys.argv[2] if len(sys.argv) > 2 else "20"
    model = str(default_model_folder())
    make_data(runs / "data")
    commands = (
        (prepare.main, ["folder", str(runs / "data"), "--output", str(runs / "rows")]),
        (precompute.main, [str(runs / "rows"), "--model", model, "--output", str(runs / "encoded")]),
        (
            train.main,
            [
                "align",
                "--preset",
                "storybook",
                "--data",
                str(runs / "encoded"),
                "--start",
                model,
                "--out",
                str(runs / "align"),
            ],
        ),
    )
    for main, arguments in commands:
        settings = [f"steps={steps}", "batch_size=4", "--workers", "0"] if main is train.main else []
        if code := main([*arguments, *settings]):
            sys.exit(code)
    print(f"serve it: make serve MODEL={runs / 'align' / 'model'}")
