"""A run as a page: its curves and its pictures. `python -m training.report RUN` writes RUN/report.html again."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
from html import escape

from training.run_folder import RunFolder

WIDTH, HEIGHT, PAD = 640, 180, 34
CURVES = ("loss", "text", "picture", "caption", "contrast", "validation_loss", "words", "mse")
SECONDS = ("data_s", "forward_s", "backward_s", "optimizer_s")
"""Communication is a part of these."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 1rem/1.5 sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; color: #2e2a25 }}
h1, h2 {{ font-weight: normal }} svg, img {{ max-width: 100%; height: auto }} img {{ image-rendering: pixelated }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(folder: RunFolder) -> str:
    """RUN/report.html, one self-contained file; returns its name."""
    lines = read_lines(folder)
    title = f"Run {folder.uri.rstrip('/').rpartition('/')[2]}"
    body = [_summary(lines, folder), *(_curve(lines, name) for name in CURVES if _points(lines, name))]
    for name in folder.names():
        if name.startswith("sheet") and name.endswith(".png"):
            data = base64.b64encode(folder.read(name) or b"").decode()
            body.append(f'<h2>{escape(name)}</h2>\n<img src="data:image/png;base64,{data}" alt="{escape(name)}">')
    if story := folder.read("story.html"):
        source = base64.b64encode(story).decode()
        body.append(
            "<h2>A story of the model that came out</h2>\n"
            f'<iframe title="story" src="data:text/html;base64,{source}" width="100%" height="700"></iframe>'
        )
    folder.write("report.html", PAGE.format(title=escape(title), body="\n".join(body)).encode())
    return "report.html"


def read_lines(folder: RunFolder) -> list[dict[str, float]]:
    """The lines of a run's log, but for those that a full disk has cut."""
    lines: list[dict[str, float]] = []
    for line in folder.read_log("log.jsonl").splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                lines.append(found)
    return lines


def _summary(lines: list[dict[str, float]], folder: RunFolder) -> str:
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return "<p>No step is logged yet.</p>"
    last = steps[-1]
    rows = [
        ("steps", f"{last['step']:.0f}"),
        ("hours", f"{last['elapsed_s'] / 3600:.2f}"),
        ("loss", f"{last['loss']:.4f}"),
    ]
    best = json.loads(folder.read("best.json") or b"{}")
    if best:
        rows.append(("best validation loss", f"{best['validation_loss']:.4f} at step {best['step']:.0f}"))
    spent = {name: sum(line.get(name, 0.0) for line in steps) for name in SECONDS}
    whole = sum(spent.values()) or 1.0
    rows += [(name.removesuffix("_s"), f"{100 * value / whole:.0f} % of a step") for name, value in spent.items()]
    waited = sum(line.get("communication_s", 0.0) for line in steps)
    rows.append(("of these communication", f"{100 * waited / whole:.0f} % of a step"))
    return "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows) + "</table>"


def _points(lines: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _curve(lines: list[dict[str, float]], name: str) -> str:
    """A curve as SVG, with its least and its largest value."""
    points = _points(lines, name)
    first, last = points[0][0], points[-1][0]
    low, high = min(value for _, value in points), max(value for _, value in points)

    def place(step: float, value: float) -> str:
        x = PAD + (step - first) / max(1, last - first) * (WIDTH - 2 * PAD)
        y = HEIGHT - PAD / 2 - (value - low) / ((high - low) or 1) * (HEIGHT - PAD)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, value) for step, value in points)
    said = f"{escape(name)} by step, from {points[0][1]:.4g} to {points[-1][1]:.4g}"
    labels = (
        f'<text x="0" y="14" font-size="11">{high:.4g}</text>'
        f'<text x="0" y="{HEIGHT - 8}" font-size="11">{low:.4g}</text>'
        f'<text x="{WIDTH - PAD}" y="{HEIGHT - 2}" font-size="11">{last:.0f}</text>'
    )
    curve = f'<polyline points="{line}" fill="none" stroke="#b5552b" stroke-width="1.5"/>'
    return (
        f"<h2>{escape(name)}</h2>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{curve}{labels}</svg>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.report", description=__doc__)
    parser.add_argument("run", help="folder or URI of a run")
    folder = RunFolder(parser.parse_args().run)
    print(f"{folder.uri}/{write_report(folder)}")


if __name__ == "__main__":
    main()
