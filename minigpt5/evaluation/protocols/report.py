"""A run's metrics and samples as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.protocols.sheets import Shown

LABEL, WIDTH, VALUE, STEP = 150, 360, 130, 22
"""Pixels of a plot: the names beside the dots, the axis, the values, and the distance of two lines."""
DOT, LINE, INK = "#b5552b", "#e4dccb", "#2e2a25"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>body {{ font: 1rem/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #2e2a25 }}
h1, h2, h3 {{ font-weight: normal; line-height: 1.25 }} h2 {{ margin-top: 2.5rem }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .15rem 1rem .15rem 0; text-align: right; font-weight: normal }}
th {{ color: #6b6459; border-bottom: 1px solid #e4dccb }} th:first-child, td:first-child {{ text-align: left }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.2rem 1rem }}
figure {{ margin: 0; font-size: .85rem; overflow-wrap: anywhere }} figure div {{ display: flex; gap: .3rem }}
figure img {{ width: 48%; aspect-ratio: 1; object-fit: contain; background: #f4efe4 }}
figure p {{ margin: .2rem 0 }} .quiet {{ color: #6b6459 }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def to_html(run: Mapping[str, Any], sheets: Mapping[str, Sequence[Shown]], *, ranked_by: str) -> str:
    """`run`: the content of metrics.json."""
    title = f"{run['protocol']}: {run['system']['name']}"
    body = [_summary(run)]
    body.append("<h2>Metrics</h2>")
    body += [_table(group, [one for one in run["metrics"] if one["group"] == group]) for group in _groups(run)]
    if run["missing"]:
        body.append("<h2>Not measured</h2><p>These metrics are left out, and no other stands for them.</p><table>")
        body += [_row(f"<code>{escape(name)}</code>", escape(why)) for name, why in sorted(run["missing"].items())]
        body.append("</table>")
    plots = [_plot(name, run["metrics"]) for name in dict.fromkeys(one["metric"] for one in run["metrics"])]
    body.append(
        "<h2>Intervals</h2><p>Dots: values. Lines: 95 % bootstrap intervals over rows.</p>"
        f'<div class="plots">{"".join(plots)}</div>'
    )
    for name, sheet in sheets.items():
        by = f" by {escape(title_of(ranked_by))}" if ranked_by and name != "Random" else ""
        body.append(f'<h2>{name}{by}</h2>\n<div class="sheet">{"".join(map(_figure, sheet))}</div>')
    return PAGE.format(title=escape(title), body="\n".join(body))


def title_of(metric: str) -> str:
    name, _, part = metric.partition("/")
    return METRICS[name].title + (f": {part.replace('_', ' ')}" if part else "")


def _groups(run: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(one["group"] for one in run["metrics"]))


def _summary(run: Mapping[str, Any]) -> str:
    rows = run["rows"]
    draw = ", ".join(f"{name} {value}" for name, value in run["draw"].items() if value not in ("", 0))
    lines = [
        ("Asks", escape(run["about"])),
        ("System", escape(f"{run['system']['name']} {run['system']['version'][:12]}")),
        ("Data", escape(run["data"])),
        ("Rows", f"{rows['measured']} measured, {rows['errors']} with errors, of {rows['asked']}"),
        ("Drawing", escape(draw)),
        ("Seed", str(run["seed"])),
    ]
    table = "<table>" + "".join(_row(name, value) for name, value in lines) + "</table>"
    return table + _reasons("Errors", run["errors"]) + _reasons("Not judged", run["unjudged"])


def _reasons(title: str, counts: Mapping[str, int]) -> str:
    """A list of how many rows have which reason; "" for none."""
    items = "".join(f"<li>{escape(f'{count} rows: {reason}')}</li>" for reason, count in counts.items())
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _row(name: str, value: str) -> str:
    return f'<tr><td>{name}</td><td style="text-align: left">{value}</td></tr>'


def _table(group: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = ["<tr><th>metric</th><th></th><th>value</th><th>95 % interval</th><th>samples</th><th>rows</th></tr>"]
    for one in metrics:
        better = METRICS[one["metric"].partition("/")[0]].better
        ends = "" if one["low"] is None else f"{number(one['low'])} to {number(one['high'])}"
        cells = (f'<span class="quiet">{better} is better</span>', number(one["mean"]), ends, one["n"], one["rows"])
        lines.append(
            f"<tr><td>{escape(title_of(one['metric']))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return f"<h3>{escape(group)}</h3>\n<table>{''.join(lines)}</table>"


def number(value: float) -> str:
    """Three digits after the point, fewer where a value is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _plot(metric: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """One metric in all groups that have it, as SVG."""
    own = [one for one in metrics if one["metric"] == metric]
    ends = [one[end] for one in own for end in ("mean", "low", "high") if one[end] is not None]
    low, high = min(0.0, *ends), max(ends)

    def place(value: float) -> float:
        return LABEL + (value - low) / ((high - low) or 1) * WIDTH

    title = title_of(metric)
    parts = [f'<text x="0" y="15" font-weight="bold">{escape(title)}</text>']
    for index, one in enumerate(own):
        y = 38 + index * STEP
        parts.append(f'<path d="M{LABEL} {y}h{WIDTH}" stroke="{LINE}"/>')
        parts.append(f'<text x="{LABEL - 10}" y="{y + 4}" text-anchor="end">{escape(one["group"])}</text>')
        if one["low"] is not None:
            path = f"M{place(one['low']):.1f} {y - 4}v8M{place(one['low']):.1f} {y}H{place(one['high']):.1f}m0 -4v8"
            parts.append(f'<path d="{path}" stroke="{INK}" fill="none"/>')
        parts.append(f'<circle cx="{place(one["mean"]):.1f}" cy="{y}" r="4" fill="{DOT}"/>')
        parts.append(f'<text x="{LABEL + WIDTH + 12}" y="{y + 4}">{number(one["mean"])}</text>')
    y = 38 + len(own) * STEP
    parts += [f'<text x="{LABEL}" y="{y}" fill="#6b6459">{number(low)}</text>']
    parts += [f'<text x="{LABEL + WIDTH}" y="{y}" text-anchor="end" fill="#6b6459">{number(high)}</text>']
    size = f"{LABEL + WIDTH + VALUE} {y + 8}"
    return (
        f'<svg viewBox="0 0 {size}" font-family="sans-serif" font-size="12" fill="{INK}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _figure(shown: Shown) -> str:
    pictures = "".join(
        f'<img src="{source}" alt="{name}" title="{name}">'
        for source, name in ((shown.true, "true"), (shown.drawn, "drawn"))
        if source
    )
    texts = [("", shown.asked), ("said: ", shown.said), ("true: ", shown.reference)]
    words = "".join(f'<p><span class="quiet">{name}</span>{escape(text)}</p>' for name, text in texts if text)
    values = ", ".join(f"{name} {number(value)}" for name, value in shown.values.items() if "/" not in name)
    where = escape(f"{shown.row}, {shown.key}")
    return f'<figure><div>{pictures}</div>{words}<p class="quiet">{escape(values)}<br>{where}</p></figure>'
