"""Our model, its rivals and ablations at one reduced budget: `python -m benchmarks.rivals [--rows NAME ...]`.

All start from the same base (training/storybook/rivals.py), are trained by `training.train`, and are asked the same
held-out rows (rival_questions.py). The budget is a number of steps, so that a busy machine makes a row slower and not
worse. A unit is one row with one seed: trained, measured, and written into benchmarks/results/rivals.json. The bench
goes on where it was stopped: units that are there are left out, and training resumes from its checkpoints. Stages that
are equal for several rows are run once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality import machine
from benchmarks.rival_figures import figures, over_seeds
from benchmarks.rival_questions import Nums, measure
from benchmarks.rival_tables import ORDER
from minigpt5.codec import to_json
from minigpt5.config import default_model_folder
from minigpt5.errors import BaseModelNotFound
from minigpt5.evaluation.systems.folder import save_system
from minigpt5.evaluation.systems.load import load_system
from minigpt5.evaluation.text import load_wordnet
from minigpt5.model.folder_config import load_config
from minigpt5.storybook.scorer import load_scorer
from training.checkpoint import checkpoints
from training.presets import Preset
from training.run_folder import RunFolder
from training.storybook.rivals import RIVALS, make_start

SHIPPED = "shipped"
"""A row that is measured alone: the base that all start from, whose own vokens were trained far longer."""
SEEDS = {"minigpt5": 3, "gill": 3, "divter": 3}
"""Rows of more than one seed: ours and its two closest rivals. Their further seeds come after all rows."""
RESULTS = Path("benchmarks") / "results" / "rivals.json"
QUICK = Path("runs") / "rivals-quick"
UNIT = ("minutes", "peak_mib", "metrics")
"""What is kept of one seed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where and how rows are made."""

    runs: Path = Path("runs") / "rivals"
    base: Path = field(default_factory=default_model_folder)
    out: Path = RESULTS
    nums: Nums = Nums()
    settings: tuple[str, ...] = ()
    """key=value for every stage: a shorter run."""


Train = Callable[[list[str]], int]
"""Arguments of `training.train` -> the most memory that it took, in MiB. Raises CalledProcessError."""


def train_apart(arguments: list[str]) -> int:
    """In a process of its own, whose memory is measured."""
    command = [sys.executable, "-m", "training.train", *arguments]
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        raise
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, command)
    return usage.ru_maxrss // 1024


def train(plan: Plan, name: str, seed: int, run: Train = train_apart) -> tuple[Path, float, int]:
    """Train a row's stages, but for those that are there. Returns the model folder or, where the last stage writes one,
    the system's folder; the minutes of all its stages; the most memory of one of them, in MiB."""
    if name == SHIPPED:
        return plan.base, 0.0, 0
    rival = RIVALS[name]
    folder = _start(plan, name, seed)
    key, minutes, peak_mib = folder.name.removeprefix("start-"), 0.0, 0
    _make_once(folder, lambda partial: make_start(name, partial, base=plan.base, seed=seed))
    for stage, preset in rival.stages.items():
        key = _key([key, _settings(preset), plan.settings], seed)
        out = plan.runs / f"{stage}-{key}"
        done = out / "done.json"
        if not done.is_file():
            arguments = [stage, "--preset", name, "--start", str(folder), "--out", str(out), "--runs", str(plan.runs)]
            peak = run([*arguments, "--workers", "0", f"seed={seed}", *plan.settings])
            written = RunFolder(str(out))
            position = json.loads(written.read(f"{checkpoints(written)[-1]}/position.json") or b"{}")
            done.write_text(json.dumps({"minutes": position["elapsed_s"] / 60, "peak_mib": peak}) + "\n")
        found = json.loads(done.read_text())
        minutes, peak_mib, folder = minutes + found["minutes"], max(peak_mib, found["peak_mib"]), out / "model"
    return folder, minutes, peak_mib


def _start(plan: Plan, name: str, seed: int) -> Path:
    """The model folder that a row starts from; rows of one shape and base share it."""
    return plan.runs / f"start-{_key([dict(RIVALS[name].config), load_config(plan.base).fingerprint], seed)}"


def _make_once(folder: Path, make: Callable[[Path], object]) -> None:
    """A folder that is there whole or not at all. A bench of other rows may make it meanwhile."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)


def _settings(preset: Preset) -> dict[str, Any]:
    """Those that differ from the defaults: a setting that is added later changes no name of a run."""
    values: dict[str, Any] = {}
    for one in dataclasses.fields(preset):
        value = getattr(preset, one.name)
        if one.default is dataclasses.MISSING or value != one.default:
            values[one.name] = to_json(value)
    return values


def _key(value: Any, seed: int) -> str:
    """A short name of what a run depends on: what comes before it, its settings, its seed."""
    values = json.dumps([value, seed], sort_keys=True, default=to_json)
    return hashlib.sha256(values.encode()).hexdigest()[:10]


def make_system(plan: Plan, name: str, seed: int, trained: Path) -> Path:
    """The folder that `load_system` opens: a model of ours as it is, a rival with its `config.json`."""
    rival = RIVALS.get(name)
    if rival is None or not rival.system or (trained / "model").is_dir():
        return trained
    folder = plan.runs / "systems" / f"{name}-{trained.parent.name}"
    is_diffusion = (trained / "unet").is_dir()
    model, decoder = (_start(plan, name, seed), trained) if is_diffusion else (trained, None)
    _make_once(folder, lambda partial: save_system(partial, rival.system, model, decoder=decoder))
    return folder


def unit(plan: Plan, name: str, seed: int, run: Train = train_apart) -> None:
    """Train and measure a row with one seed, and write what is known of the row."""
    trained, minutes, peak_mib = train(plan, name, seed, run)
    folder, began = make_system(plan, name, seed, trained), time.monotonic()
    print(f"{name}, seed {seed}: {folder} is measured", flush=True)
    sheet = plan.runs / "sheets" / f"{name}-{seed}.png"
    items = measure(load_system(str(folder), num_threads=1), load_scorer(), plan.nums, sheet=sheet)
    minutes += (time.monotonic() - began) / 60
    measured = {"seed": seed, "minutes": round(minutes, 1), "peak_mib": peak_mib, "metrics": figures(items)}
    write_row(plan, name, measured)


def write_row(plan: Plan, name: str, measured: dict[str, Any]) -> None:
    """Write a row with a seed more, in the order of the bench. A row of several seeds keeps the figures of each, so
    that the next one can be measured anywhere."""
    rows = {one["name"]: one for one in read_rows(plan.out)}
    units = [one for one in _units(rows.get(name)) if one["seed"] != measured["seed"]] + [measured]
    units.sort(key=lambda one: one["seed"])
    rows[name] = {
        "name": name,
        "seeds": [one["seed"] for one in units],
        "minutes": round(statistics.mean(one["minutes"] for one in units), 1),
        "peak_mib": max(one["peak_mib"] for one in units),
        "metrics": over_seeds([one["metrics"] for one in units]),
        **({"of_seeds": units} if len(units) > 1 else {}),
    }
    ordered = sorted(rows.values(), key=lambda one: ORDER.index(one["name"]))
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    budget = {"captions": plan.nums.captions, "stories": plan.nums.stories, "dialogues": plan.nums.dialogues}
    command = shlex.join(["python", "-m", "benchmarks.rivals"])
    content = {"rows": ordered, "items": budget, "machine": machine(), "command": command}
    partial = plan.out.with_name(f".{plan.out.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(plan.out)


def _units(row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The figures of each seed of a row: a row of one seed is those itself."""
    if row is None:
        return []
    return row.get("of_seeds") or [{"seed": row["seeds"][0], **{name: row[name] for name in UNIT}}]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _num_seeds(name: str) -> int:
    return SEEDS.get(name, 1)


def units_left(plan: Plan, names: Sequence[str]) -> list[tuple[str, int]]:
    """(row, seed) in their order: every row once, then further seeds. Those in the results are done."""
    done = {(row["name"], seed) for row in read_rows(plan.out) for seed in row["seeds"]}
    most = max(map(_num_seeds, names))
    units = [(name, seed) for seed in range(1, most + 1) for name in names if seed <= _num_seeds(name)]
    return [one for one in units if one not in done]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ORDER, default=ORDER, metavar="NAME", help="by default all")
    parser.add_argument("--runs", type=Path, help=f"folder of all runs (default {Plan.runs}, {QUICK} with --quick)")
    parser.add_argument("--base", type=Path, default=default_model_folder(), help="model folder that all start from")
    parser.add_argument("--out", type=Path, help=f"file of the rows (default {RESULTS}, in --runs with --quick)")
    parser.add_argument("--quick", action="store_true", help="two steps and few items: a check that the bench runs")
    options = parser.parse_args(arguments)
    runs = (options.runs or (QUICK if options.quick else Plan.runs)).absolute()
    out = options.out or (runs / RESULTS.name if options.quick else RESULTS)
    if options.quick and out.resolve() == RESULTS.resolve():
        parser.error(f"--out is {out}, which is for whole runs: name another file with --quick")
    plan = Plan(runs=runs, base=options.base, out=out)
    if options.quick:
        plan = dataclasses.replace(
            plan, nums=Nums(captions=2, stories=2, dialogues=1), settings=("steps=2", "batch_size=2")
        )
    try:
        load_wordnet()
    except BaseModelNotFound as error:  # said before hours of training, and not after them
        print(f"METEOR will be left out: {error}", flush=True)
    for name, seed in units_left(plan, options.rows):
        unit(plan, name, seed)


if __name__ == "__main__":
    main()
