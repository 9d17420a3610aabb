"""Two simulated runs as one SVG: replicas, queues, and each story's time to its first picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks.cluster_model import Arrival, Run

WIDTH, HEIGHT, LEFT, GAP = 400, 130, 46, 34
COLOURS = ("#b5552b", "#2b6cb5")
Points = Sequence[tuple[float, float]]


def plot(path: Path, arrivals: Sequence[Arrival], runs: Mapping[str, Run]) -> None:
    """Write a column for each run, with the same scales."""
    arrived = [arrival.at_s for arrival in sorted(arrivals, key=lambda one: one.at_s)]
    rows: dict[str, dict[str, list[Points]]] = {"replicas: generators, decoders": {}, "stories, pictures under way": {}}
    dots = "seconds to the first picture, by the story's arrival"
    rows[dots] = {}
    for name, run in runs.items():
        for row, keys in zip(rows, (("generators", "decoders"), ("stories", "pictures")), strict=False):
            rows[row][name] = [[(seen["at_s"], seen[key]) for seen in run.series] for key in keys]
        rows[dots][name] = [list(zip(arrived, run.first_picture_s, strict=True))]
    end_s = max(run.series[-1]["at_s"] for run in runs.values())
    parts = [
        f'<text x="{LEFT + column * (LEFT + WIDTH)}" y="16" font-weight="bold">{escape(name)}</text>'
        for column, name in enumerate(runs)
    ]
    for number, (title, curves) in enumerate(rows.items()):
        high = max(value for lines in curves.values() for line in lines for _, value in line)
        for column, name in enumerate(runs):
            x, y = LEFT + column * (LEFT + WIDTH), 24 + GAP + number * (HEIGHT + GAP)
            parts.append(_panel(x, y, title, curves[name], end_s=end_s, high=high, is_dots=title == dots))
    size = f"{len(runs) * (LEFT + WIDTH) + 20} {24 + len(rows) * (HEIGHT + GAP) + 26}"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12" '
        f'fill="#2e2a25">\n<title>A burst of 16-page stories under two policies</title>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(x: float, y: float, title: str, lines: Sequence[Points], *, end_s: float, high: float, is_dots: bool) -> str:
    def place(at_s: float, value: float) -> tuple[float, float]:
        return x + at_s / end_s * WIDTH, y + HEIGHT - value / high * HEIGHT

    parts = [
        f'<text x="{x}" y="{y - 8}">{escape(title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>',
        f'<text x="{x - 6}" y="{y + 10}" text-anchor="end">{high:.0f}</text>',
        f'<text x="{x - 6}" y="{y + HEIGHT}" text-anchor="end">0</text>',
        f'<text x="{x + WIDTH}" y="{y + HEIGHT + 14}" text-anchor="end">{end_s:.0f} s</text>',
    ]
    for line, colour in zip(lines, COLOURS, strict=False):
        if is_dots:
            spots = (place(*point) for point in line)
            parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2" fill="{colour}"/>' for left, top in spots]
        else:
            steps = [line[0], *(point for before, point in zip(line, line[1:], strict=False) if before[1] != point[1])]
            # A step is level up to the next one.
            corners = [
                corner
                for one, after in zip(steps, [*steps[1:], line[-1]], strict=True)
                for corner in (one, (after[0], one[1]))
            ]
            where = " ".join(f"{left:.1f},{top:.1f}" for left, top in (place(*corner) for corner in corners))
            parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "\n".join(parts)
