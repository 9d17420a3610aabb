"""What came out of from_packages.py: FOLDER/figures.json, and FOLDER/report.html, which shows figures and pictures."""

from __future__ import annotations

import base64
import json
import os
from html import escape
from pathlib import Path
from typing import Any

import torch

from training.report import PAGE, read_lines
from training.run_folder import RunFolder

LOSSES = ("text", "picture", "caption")
WORDS = {
    "vision": "reads a stamp and writes its caption",
    "align": "reads a caption and draws its stamp",
    "learn": "writes and draws the next page of a campaign",
}
HONEST = """<p>These pictures are outside of what the decoder has seen. Its VAE and its UNet learnt a world of flat
pictures with 54 things in it, and stay as they are: only what they are given as a condition is learnt here. The first
row of a sheet shows the held-out pictures as the VAE can draw them at best. The second row is what the UNet draws from
the caption's own condition, the third row what it draws from the vokens.</p>"""


def read_stage(run: Path) -> dict[str, Any]:
    """A run's losses on rows that it never trained on, before its first step and when they were last measured, with the
    steps and minutes until then."""
    lines = read_lines(RunFolder(str(run)))
    measured = [line for line in lines if "validation_loss" in line]
    steps = measured[-1]["step"]
    trained = [line for line in lines if "elapsed_s" in line and line["step"] <= steps]
    found = {"steps": steps, "minutes": trained[-1]["elapsed_s"] / 60}
    for name in LOSSES:
        if (key := f"validation_{name}") in measured[0]:
            found[name] = {"before": measured[0][key], "after": measured[-1][key]}
    return found


def find_redone(run: Path) -> dict[str, float]:
    """Lines of a run's log that a kill made it write twice, and the largest relative difference of their losses."""
    seen: dict[int, float] = {}
    differences = []
    for line in read_lines(RunFolder(str(run))):
        if "loss" in line:
            if (step := line["step"]) in seen:
                differences.append(abs(line["loss"] / seen[step] - 1))
            seen[step] = line["loss"]
    return {"lines": len(differences), "largest_difference": max(differences, default=0.0)}


def read_figures(place: Path, stages: list[str]) -> dict[str, Any]:
    counts = {name: json.loads((place / "rows" / name / "manifest.json").read_text()) for name in ("stamps", "tales")}
    kept = ("rows", "rejects", "pictures")
    measured = {stage: read_stage(place / stage) for stage in stages}
    spent = {path.stem: json.loads(path.read_text())["seconds"] / 60 for path in (place / "done").iterdir()}
    # A command that was started again counts from its first start, which its log knows.
    spent |= {stage: max(spent[stage], measured[stage]["minutes"]) for stage in stages}
    return {
        "data": {name: {key: one[key] for key in kept} for name, one in counts.items()},
        "stages": measured,
        "redone": {stage: find_redone(place / stage) for stage in stages},
        "minutes": sum(spent.values()),
    }


def write_page(place: Path, stages: list[str]) -> Path:
    """Write both files; returns the page."""
    figures = read_figures(place, stages)
    machine = {"cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    whole = {"figures": figures, "machine": machine, "command": "make own-model"}
    (place / "figures.json").write_text(json.dumps(whole, indent=1) + "\n")
    rows = [
        f"<tr><td>{stage}</td><td>{name}</td><td>{loss['before']:.4f}</td><td>{loss['after']:.4f}</td></tr>"
        for stage, found in figures["stages"].items()
        for name, loss in found.items()
        if name in LOSSES
    ]
    body = [HONEST, "<h2>Losses on rows that were never trained on</h2>", "<table><tr><th>stage</th><th>loss</th>"]
    body += ["<th>before</th><th>after</th></tr>", *rows, "</table>"]
    for stage, found in figures["stages"].items():
        words = f"{stage}: {WORDS[stage]}; {found['steps']} steps, {found['minutes']:.0f} minutes"
        body.append(f'<h2>{escape(words)}</h2><p><a href="{stage}/report.html">its curves</a></p>')
        if (sheet := place / stage / "sheet.png").is_file():
            data = base64.b64encode(sheet.read_bytes()).decode()
            body.append(f'<img src="data:image/png;base64,{data}" alt="sheet of {stage}">')
    body.append('<h2>Books</h2><p><a href="books.books/index.html">what it writes and draws</a></p>')
    page = place / "report.html"
    page.write_text(PAGE.format(title="A model from bases that packages carry", body="\n".join(body)))
    return page
