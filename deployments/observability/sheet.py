"""The dashboard as one SVG picture, from a Prometheus: for a machine without Grafana, and for a look in tests."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from xml.sax.saxutils import escape

import httpx

from deployments.observability.dashboard import COLUMNS, ROWS_OF_PANELS, WINDOW, Panel

POINTS = 120
"""Of a line."""
RATE_WINDOW = "1m"
"""In the place of the window that Grafana chooses."""
PANEL_PX, TALL_PX, GAP_PX, TITLE_PX = 400, 200, 16, 34
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 44, 10, 28, 60
"""Around a panel's plot."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a panel."""

    legend: str
    points: list[tuple[float, float]]
    """(time, value)."""


def draw_sheet(prometheus: str, *, minutes: float) -> str:
    """All panels over the last minutes, as SVG. Raises httpx.HTTPError where Prometheus does not answer."""
    end = time.time()
    start = end - minutes * 60
    parts: list[str] = []
    top = GAP_PX
    with httpx.Client(base_url=prometheus, timeout=30) as client:
        for title, panels in ROWS_OF_PANELS.items():
            parts.append(_text(GAP_PX, top + 18, title, size=16, weight="bold"))
            for index, panel in enumerate(panels):
                lines = read_lines(client, panel, start=start, end=end)
                left = GAP_PX + index % COLUMNS * (PANEL_PX + GAP_PX)
                upper = top + TITLE_PX + index // COLUMNS * (TALL_PX + GAP_PX)
                drawn = _draw_panel(panel, lines, start=start, end=end)
                parts.append(f'<g transform="translate({left} {upper})">{drawn}</g>')
            top += TITLE_PX + -(-len(panels) // COLUMNS) * (TALL_PX + GAP_PX)
    width = GAP_PX + COLUMNS * (PANEL_PX + GAP_PX)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#f4f5f5"/>{"".join(parts)}</svg>\n'
    )


def read_lines(client: httpx.Client, panel: Panel, *, start: float, end: float) -> list[Line]:
    """A panel's series by `query_range`, without points that are no number. Raises httpx.HTTPError."""
    lines = []
    for legend, expression in panel.expressions.items():
        query = {
            "query": expression.replace(WINDOW, RATE_WINDOW),
            "start": f"{start:.3f}",
            "end": f"{end:.3f}",
            "step": f"{(end - start) / POINTS:.3f}",
        }
        reply = client.get("/api/v1/query_range", params=query)
        reply.raise_for_status()
        for found in reply.json()["data"]["result"]:
            name = legend
            for label, value in found["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            points = [(float(when), float(value)) for when, value in found["values"]]
            lines.append(Line(legend=name, points=[point for point in points if math.isfinite(point[1])]))
    return [line for line in lines if line.points]


def _draw_panel(panel: Panel, lines: list[Line], *, start: float, end: float) -> str:
    most = max((value for line in lines for _, value in line.points), default=0.0) or 1.0
    wide, tall = PANEL_PX - LEFT_PX - RIGHT_PX, TALL_PX - TOP_PX - BOTTOM_PX
    parts = [
        f'<rect width="{PANEL_PX}" height="{TALL_PX}" fill="white" stroke="#d8d9da"/>',
        _text(10, 19, panel.title, size=13, weight="bold"),
    ]
    for share in (0.0, 0.5, 1.0):
        y = TOP_PX + tall * (1 - share)
        parts.append(f'<path d="M{LEFT_PX} {y:.0f}h{wide}" stroke="#e3e4e5"/>')
        parts.append(_text(LEFT_PX - 5, y + 4, _number(share * most, panel.unit), anchor="end"))
    for colour, line in zip(COLOURS, lines, strict=False):
        xy = [
            f"{LEFT_PX + wide * (when - start) / (end - start):.0f} {TOP_PX + tall * (1 - value / most):.1f}"
            for when, value in line.points
        ]
        parts.append(f'<path d="M{"L".join(xy)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    x, y = 10, TALL_PX - 36
    for colour, line in zip(COLOURS, lines, strict=False):
        wide_px = 16 + 6 * len(line.legend)
        if x + wide_px > PANEL_PX:
            x, y = 10, y + 14
        parts.append(f'<path d="M{x} {y - 4}h8" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(x + 11, y, line.legend))
        x += wide_px
    return "".join(parts)


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    return f"{value:.3g}{' s' if unit == 's' else ''}"


def _text(x: float, y: float, text: str, *, size: int = 11, weight: str = "normal", anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style} fill="#24292e">{escape(text)}</text>'
