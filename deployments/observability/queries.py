"""Expressions of PromQL over the table's metrics: a metric that is not there cannot be asked for."""

from __future__ import annotations

import re

from deployments.observability.metrics import METRICS, Metric

REPLICAS = "ray_serve_deployment_replica_healthy"
"""1 of each replica that passes its health checks; Serve's own."""
PROXY_REQUESTS = "ray_serve_num_http_requests_total"
"""Requests that Serve's proxies have answered, those that they refused themselves included; Serve's own."""
PROXY_ERRORS = "ray_serve_num_http_error_requests_total"
"""Those of them with a status from 400 on, by the label `error_code`; Serve's own."""
OF_SERVE = {REPLICAS, PROXY_REQUESTS, PROXY_ERRORS}
NAME = re.compile(r"\bray_\w+")


def series(metric: Metric, **labels: str) -> str:
    """The metric where its labels have these values. Raises ValueError where a value is never recorded."""
    for name, value in labels.items():
        if value not in metric.labels[name]:
            raise ValueError(f"{metric.name} is never recorded with {name}={value!r}")
    chosen = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return metric.exported + (f"{{{chosen}}}" if chosen else "")


def total(metric: Metric, *, by: str = "", **labels: str) -> str:
    """A gauge's sum over all replicas."""
    return f"sum{_by(by)} ({series(metric, **labels)})"


def rate(metric: Metric, window: str, *, by: str = "", **labels: str) -> str:
    """A counter's increase a second, over all replicas."""
    return f"sum{_by(by)} (rate({series(metric, **labels)}[{window}]))"


def quantile(metric: Metric, share: float, window: str, *, by: str = "") -> str:
    """The value that this share of a histogram's observations does not exceed."""
    labels = f"le,{by}" if by else "le"
    buckets = f"sum by ({labels}) (rate({metric.exported}_bucket[{window}]))"
    return f"histogram_quantile({share:g}, {buckets})"


def names(expression: str) -> set[str]:
    """The metrics that an expression asks for, as the table has them; Serve's own as they are."""
    found = {re.sub(r"_bucket$", "", name) for name in NAME.findall(expression)}
    known = {metric.exported for metric in METRICS} | OF_SERVE
    assert found <= known, found - known
    return found


def _by(label: str) -> str:
    return f" by ({label})" if label else ""
