"""Recording: one function for all metrics. Ray's instruments are made by the table when a value comes first.

A call takes some microseconds. Engines therefore count by themselves, and their totals are recorded once a second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.observability.metrics import Metric


class Record(Protocol):
    """Set a gauge, add to a counter, or observe a value of a histogram."""

    def __call__(self, metric: Metric, value: float, /, **labels: str) -> None: ...


def record(metric: Metric, value: float, /, **labels: str) -> None:
    """Record a value in this process; inside a replica Serve adds the labels that say which it is."""
    assert all(labels[name] in values for name, values in metric.labels.items()), (metric.name, labels)
    instrument = _instrument(metric)
    if isinstance(instrument, Gauge):
        instrument.set(value, tags=labels)
    elif isinstance(instrument, Histogram):
        instrument.observe(value, tags=labels)
    elif value:
        instrument.inc(value, tags=labels)
    else:  # which `inc` refuses, and which shows the series
        instrument._record(0.0, tags=labels)


def begin_at_zero(metrics: Iterable[Metric]) -> None:
    """Export all series of these counters from now on. A series that begins at 1 hides its first event from `rate`."""
    for metric in metrics:
        for labels in metric.label_sets:
            record(metric, 0, **labels)


@functools.cache
def _instrument(metric: Metric) -> Counter | Gauge | Histogram:
    labels = tuple(metric.labels)
    match metric.kind:
        case "gauge":
            return Gauge(metric.name, description=metric.help, tag_keys=labels)
        case "counter":  # Ray ends the name of a counter with _total
            return Counter(metric.name.removesuffix("_total"), description=metric.help, tag_keys=labels)
        case "histogram":
            return Histogram(metric.name, description=metric.help, boundaries=list(metric.buckets), tag_keys=labels)
