"""The Grafana dashboard: rows of panels, each with expressions over the table's metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deployments.observability.metrics import (
    ADMITTED_REQUESTS,
    DENOISING_STEPS,
    DRAWN_PICTURES,
    FIRST_PICTURE,
    FIRST_TEXT,
    GENERATED_TOKENS,
    HTTP_REQUESTS,
    LOADED_ADAPTERS,
    MAX_ROWS,
    PAGE_INTERVAL,
    PAGE_STAGE,
    PAGES,
    PENDING_SAMPLES,
    PENDING_TOKENS,
    PROMPT_TOKENS,
    QUEUED_REQUESTS,
    REUSED_PROMPT_TOKENS,
    ROWS,
    RUNNING_REQUESTS,
    STEPS,
    STORIES,
    Metric,
)
from deployments.observability.queries import PROXY_ERRORS, REPLICAS, quantile, rate, series, total

SCHEMA_VERSION = 41
"""Of Grafana 12. Later ones migrate it by themselves."""
WINDOW = "$__rate_interval"
"""Grafana chooses the window: at least four scrapes."""
WIDTH, HEIGHT, COLUMNS = 8, 7, 3
"""Of a panel, in Grafana's grid of 24 columns."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph."""

    title: str
    help: str
    expressions: dict[str, str]
    """Legend -> PromQL."""
    unit: Literal["short", "s", "percentunit", "reqps"] = "short"


def by_quantile(metric: Metric, *shares: float) -> dict[str, str]:
    return {f"p{share * 100:g}": quantile(metric, share, WINDOW) for share in shares}


HITS = f"{rate(REUSED_PROMPT_TOKENS, WINDOW)} / {rate(PROMPT_TOKENS, WINDOW)}"
PICTURE_HITS = f"{rate(DRAWN_PICTURES, WINDOW, result='cached')} / {rate(DRAWN_PICTURES, WINDOW)}"
OCCUPANCY = (
    f"{rate(ROWS, WINDOW, by='engine')} / ({rate(STEPS, WINDOW, by='engine')} * max by (engine) ({series(MAX_ROWS)}))"
)
ROWS_OF_PANELS: dict[str, list[Panel]] = {
    "What readers see": [
        Panel(
            title="Time to first text",
            help=FIRST_TEXT.help,
            expressions=by_quantile(FIRST_TEXT, 0.5, 0.95),
            unit="s",
        ),
        Panel(
            title="Time to first picture",
            help=FIRST_PICTURE.help,
            expressions=by_quantile(FIRST_PICTURE, 0.5, 0.95),
            unit="s",
        ),
        Panel(
            title="Page interval",
            help=PAGE_INTERVAL.help,
            expressions=by_quantile(PAGE_INTERVAL, 0.5, 0.95),
            unit="s",
        ),
        Panel(
            title="Requests by result",
            help=HTTP_REQUESTS.help,
            expressions={"{{result}}": rate(HTTP_REQUESTS, WINDOW, by="result")},
            unit="reqps",
        ),
        Panel(
            title="Errors by status",
            help="Errors as clients see them: the fronts' own, and those of Serve's proxies, which no front hears of.",
            expressions={"{{error_code}}": f"sum by (error_code) (rate({PROXY_ERRORS}[{WINDOW}]))"},
            unit="reqps",
        ),
        Panel(
            title="Stories by outcome",
            help=STORIES.help,
            expressions={"{{outcome}}": rate(STORIES, WINDOW, by="outcome")},
            unit="reqps",
        ),
        Panel(
            title="Pages by picture",
            help=PAGES.help,
            expressions={"{{picture}}": rate(PAGES, WINDOW, by="picture")},
            unit="reqps",
        ),
    ],
    "Load": [
        Panel(
            title="Requests in flight",
            help="Requests that the fronts have accepted, and those inside the engines' steps.",
            expressions={
                "fronts": total(ADMITTED_REQUESTS),
                "{{engine}}": total(RUNNING_REQUESTS, by="engine"),
            },
        ),
        Panel(
            title="Queue length",
            help=QUEUED_REQUESTS.help,
            expressions={"{{engine}}": total(QUEUED_REQUESTS, by="engine")},
        ),
        Panel(
            title="Pending work",
            help="Tokens, and denoiser samples, that accepted requests still need.",
            expressions={"tokens": total(PENDING_TOKENS), "samples": total(PENDING_SAMPLES)},
        ),
        Panel(
            title="Batch occupancy",
            help="Rows of a step / rows that a step has room for. A picture larger than a step counts as more than 1.",
            expressions={"{{engine}}": OCCUPANCY},
            unit="percentunit",
        ),
        Panel(
            title="Replicas",
            help="Replicas that pass their health checks.",
            expressions={"{{deployment}}": f"sum by (deployment) ({REPLICAS})"},
        ),
        Panel(
            title="Adapters loaded",
            help=LOADED_ADAPTERS.help,
            expressions={"adapters": total(LOADED_ADAPTERS)},
        ),
    ],
    "Engines": [
        Panel(
            title="Tokens a second",
            help="Tokens drawn, and prompt tokens taken in.",
            expressions={"generated": rate(GENERATED_TOKENS, WINDOW), "prompt": rate(PROMPT_TOKENS, WINDOW)},
        ),
        Panel(
            title="Denoising steps a second",
            help=DENOISING_STEPS.help,
            expressions={"steps": rate(DENOISING_STEPS, WINDOW)},
        ),
        Panel(
            title="Pictures by result",
            help=DRAWN_PICTURES.help,
            expressions={"{{result}}": rate(DRAWN_PICTURES, WINDOW, by="result")},
            unit="reqps",
        ),
        Panel(
            title="Seconds a page by stage, p50",
            help=PAGE_STAGE.help,
            expressions={"{{stage}}": quantile(PAGE_STAGE, 0.5, WINDOW, by="stage")},
            unit="s",
        ),
        Panel(
            title="Seconds a page by stage, p95",
            help=PAGE_STAGE.help,
            expressions={"{{stage}}": quantile(PAGE_STAGE, 0.95, WINDOW, by="stage")},
            unit="s",
        ),
        Panel(
            title="Cache hits",
            help="Prompt tokens found in the KV cache / prompt tokens; pictures found in the cache / pictures.",
            expressions={"prompt tokens": HITS, "pictures": PICTURE_HITS},
            unit="percentunit",
        ),
    ],
}
PANELS = [panel for panels in ROWS_OF_PANELS.values() for panel in panels]


def dashboard() -> dict[str, Any]:
    """Grafana's JSON. Its one variable is the Prometheus data source."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS_OF_PANELS.items():
        panels.append(
            {
                "type": "row",
                "id": len(panels) + 1,
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
            }
        )
        for index, panel in enumerate(row):
            place = {
                "x": index % COLUMNS * WIDTH,
                "y": top + 1 + index // COLUMNS * HEIGHT,
                "w": WIDTH,
                "h": HEIGHT,
            }
            panels.append(_to_json(panel, number=len(panels) + 1, place=place))
        top += 1 + -(-len(row) // COLUMNS) * HEIGHT
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "minigpt5",
        "title": "MiniGPT-5",
        "tags": ["minigpt5", "ray"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [variable]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _to_json(panel: Panel, *, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
        for index, (legend, expression) in enumerate(panel.expressions.items())
    ]
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }
