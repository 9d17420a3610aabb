"""The alert rules of Prometheus, over the table's metrics. Each has a section in docs/operations.md that says what to
do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deployments.observability.metrics import (
    FIRST_PICTURE,
    HTTP_REQUESTS,
    PAGES,
    QUEUED_REQUESTS,
    RUNNING_REQUESTS,
    STORIES,
    Metric,
)
from deployments.observability.queries import PROXY_ERRORS, PROXY_REQUESTS, REPLICAS, quantile, rate, series, total

DEPLOYMENTS = ("Ingress", "VokenGenerator", "DiffusionDecoder")
RUNBOOK = "docs/operations.md"
FIRST_PICTURE_S = 60
"""p95 above which readers wait too long for a first picture."""
QUEUE_REQUESTS = 8
"""Waiting requests below which a growing queue is no news."""
SERVER = "namespace,application"
"""Labels that tell servers apart: one Prometheus may watch several. Prometheus' operator adds the first."""
ASKED = 'application!="",route!~".*/(healthz|readyz)"'
"""Requests that are no probes: those of Serve's proxies belong to no application."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One rule."""

    name: str
    expression: str
    """What is true while something is wrong."""
    lasts: str
    """How long it must be, such as "5m"."""
    severity: Literal["critical", "warning"]
    summary: str

    @property
    def anchor(self) -> str:
        """Of its section in the runbook."""
        return self.name.lower()


def share(metric: Metric, window: str, bad: dict[str, str], good: dict[str, str] | None = None) -> str:
    """Part of a counter's increase that is bad: of all, or of bad and good together."""
    part = rate(metric, window, by=SERVER, **bad)
    whole = rate(metric, window, by=SERVER, **(good or {}))
    return f"{part} / {whole}" if good is None else f"{part} / ({part} + {whole})"


def refused(window: str) -> str:
    """Part of the requests that get 503, from a front or from a proxy whose queue is full or that finds no front."""
    refusals = f'sum by ({SERVER}) (rate({PROXY_ERRORS}{{error_code="503",{ASKED}}}[{window}]))'
    return f"{refusals} / sum by ({SERVER}) (rate({PROXY_REQUESTS}{{{ASKED}}}[{window}]))"


def no_replica() -> str:
    """Where a server's replicas are known and none is healthy, or where no server has such a deployment at all."""
    known = f'max by ({SERVER},deployment) ({REPLICAS}{{deployment=~"{"|".join(DEPLOYMENTS)}"}}) < 1'
    unknown = (f'absent({REPLICAS}{{deployment="{name}"}})' for name in DEPLOYMENTS)
    return " or ".join((known, *unknown))


def no_metrics() -> str:
    """Where a server has generators and Prometheus does not find them, or no generator of any server."""
    running = series(RUNNING_REQUESTS)
    replicas = f'max by ({SERVER}) ({REPLICAS}{{deployment="VokenGenerator"}}) > 0'
    return f"{replicas} unless max by ({SERVER}) ({running}) or absent({running})"


ALERTS = (
    Alert(
        name="NoReplica",
        expression=no_replica(),
        lasts="3m",
        severity="critical",
        summary="{{ $labels.deployment }} has no replica that passes its health checks.",
    ),
    Alert(
        name="MetricsMissing",
        expression=no_metrics(),
        lasts="5m",
        severity="warning",
        summary="Prometheus finds no metrics of the engines.",
    ),
    Alert(
        name="RequestsRefused",
        expression=f"{refused('5m')} > 0.05",
        lasts="10m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the requests are refused with 503.",
    ),
    Alert(
        name="QueueGrowing",
        expression=(
            f"{total(QUEUED_REQUESTS, by=f'{SERVER},engine')} > {QUEUE_REQUESTS} "
            f"and deriv({total(QUEUED_REQUESTS, by=f'{SERVER},engine')}[10m:30s]) > 0"
        ),
        lasts="10m",
        severity="warning",
        summary="{{ $value }} requests wait for the {{ $labels.engine }}, and their number grows.",
    ),
    Alert(
        name="FirstPictureSlow",
        expression=f"{quantile(FIRST_PICTURE, 0.95, '10m', by=SERVER)} > {FIRST_PICTURE_S}",
        lasts="10m",
        severity="warning",
        summary="One story in twenty waits {{ $value | humanizeDuration }} or longer for its first picture.",
    ),
    Alert(
        name="StorageFailing",
        expression=(
            f"{rate(STORIES, '5m', by=SERVER, outcome='storage_error')} "
            f"+ {rate(HTTP_REQUESTS, '5m', by=SERVER, result='storage_error')} > 0"
        ),
        lasts="1m",
        severity="critical",
        summary="Stories or requests fail because the storage does.",
    ),
    Alert(
        name="EngineErrors",
        expression=f"{share(STORIES, '10m', {'outcome': 'engine_error'})} > 0.02",
        lasts="5m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the stories fail in an engine.",
    ),
    Alert(
        name="PicturesNotDrawn",
        expression=f"{share(PAGES, '10m', {'picture': 'failed'}, {'picture': 'drawn'})} > 0.05",
        lasts="10m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the pictures are not drawn; their pages say why.",
    ),
)


def rules() -> dict[str, Any]:
    """Prometheus' rule file."""
    return {
        "groups": [
            {
                "name": "minigpt5",
                "rules": [
                    {
                        "alert": f"MiniGPT5{alert.name}",
                        "expr": alert.expression,
                        "for": alert.lasts,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "runbook": f"{RUNBOOK}#{alert.anchor}"},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
