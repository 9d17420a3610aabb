"""Samples -> every metric of a protocol with its interval, group by group.

Pictures are measured as they come and let go; what stays is a value of each sample, the features that sets are
compared by, and the texts of a corpus.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minigpt5.evaluation import frechet, text
from minigpt5.evaluation.bootstrap import Interval, mean_interval, set_interval
from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.protocols.of_samples import OF_SAMPLES, of_row
from minigpt5.evaluation.protocols.protocol import Protocol, Sample
from minigpt5.evaluation.protocols.scorers import NEEDS, Scorers

BATCH_SAMPLES = 64
SET_RESAMPLES = 100
WIDE = 512
"""Features of more dimensions than this, after `_reduce`, are resampled less often: a distance takes seconds then."""
WIDE_RESAMPLES = 20
SETS = ("fid", "fid_published", "inception_score", "efficientnet_distance")
"""Metrics of sets of pictures."""
SPLITS = 10
"""Parts of the Inception Score, as published."""


@dataclass(frozen=True)
class _Feature:
    """Features of one picture, and whether it was drawn or is a true one."""

    is_drawn: bool
    values_D: Tensor


class Measures:
    """Example: measures = Measures(VIST, scorers); measures.add(samples); measures.results()"""

    def __init__(self, protocol: Protocol, scorers: Scorers, *, seed: int = 0) -> None:
        self.protocol, self.scorers, self.seed = protocol, scorers, seed
        self._waiting: list[Sample] = []
        self._values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._features: dict[tuple[str, str], dict[str, list[_Feature]]] = defaultdict(lambda: defaultdict(list))
        self._texts: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        self.on_measured: Callable[[Sample, dict[str, float]], None] = lambda sample, values: None
        """Called with each sample and its values."""

    def add(self, samples: Sequence[Sample]) -> None:
        """Take in all samples of one row."""
        for metric in self.protocol.of_rows:
            if self.scorers.has(metric) and samples:
                for group, value in of_row(metric, samples, self.scorers).items():
                    self._values[metric, group][samples[0].row].append(value)
        self._waiting += samples
        if len(self._waiting) >= BATCH_SAMPLES:
            self._measure()

    def _measure(self) -> None:
        samples, self._waiting = self._waiting, []
        values: list[dict[str, float]] = [dict(sample.values) for sample in samples]
        for metric in self.protocol.metrics:
            if metric not in OF_SAMPLES or not self.scorers.has(metric):
                continue
            applies, compare = OF_SAMPLES[metric]
            chosen = [index for index, sample in enumerate(samples) if applies(sample)]
            if chosen:
                found = compare([samples[index] for index in chosen], self.scorers.parts.get(NEEDS.get(metric, "")))
                for index, more in zip(chosen, found, strict=True):
                    values[index].update(more)
        self._extract(samples)
        for sample, own in zip(samples, values, strict=True):
            for group in sample.groups:
                for metric, value in own.items():
                    self._values[metric, group][sample.row].append(value)
                if sample.said is not None and sample.reference is not None:
                    self._texts[group][sample.row].append((sample.said, sample.reference))
            self.on_measured(sample, own)

    def _extract(self, samples: Sequence[Sample]) -> None:
        """Features of all pictures for the metrics of sets."""
        for metric in SETS:
            if metric not in self.protocol.metrics or not self.scorers.has(metric):
                continue
            pictures = [
                (sample, is_drawn, picture)
                for sample in samples
                for is_drawn, picture in ((True, sample.drawn), (False, sample.true))
                if picture is not None and (is_drawn or metric != "inception_score")
            ]
            if not pictures:
                continue
            px = frechet.PUBLISHED_PX if metric == "fid_published" else None
            network = self.scorers.parts[NEEDS[metric]]
            for size in sorted({picture.shape for _, _, picture in pictures}):  # one call takes one size
                same = [one for one in pictures if one[2].shape == size]
                features_BD = frechet.extract([picture for _, _, picture in same], network, px=px)
                for (sample, is_drawn, _), values_D in zip(same, features_BD, strict=True):
                    for group in sample.groups:
                        self._features[metric, group][sample.row].append(_Feature(is_drawn, values_D))

    def results(self) -> list[dict[str, Any]]:
        """An entry for each metric and group: its name, n, rows, mean, low and high, in a fixed order."""
        self._measure()
        found: dict[tuple[str, str], Interval] = {}
        for (metric, group), rows in self._values.items():
            by_row = metric.endswith("_published")  # metric.py averages within a dialogue first
            found[group, metric] = mean_interval(_sorted(rows), by_row=by_row, seed=self.seed)
        for (metric, group), features in self._features.items():
            interval = self._of_sets(metric, _sorted(features))
            if interval:
                found[group, metric] = interval
        for group, texts in self._texts.items():
            for metric, order in (("bleu_1", 1), ("bleu_2", 2)):
                if metric in self.protocol.metrics:
                    found[group, metric] = set_interval(
                        _sorted(texts), _bleu_of(order), resamples=SET_RESAMPLES, seed=self.seed
                    )
        places = {name: number for number, name in enumerate(METRICS)}
        keys = sorted(found, key=lambda key: (key[0], places[key[1].partition("/")[0]], key[1]))
        return [{"metric": metric, "group": group, **asdict(found[group, metric])} for group, metric in keys]

    def _of_sets(self, metric: str, rows: dict[str, list[_Feature]]) -> Interval | None:
        """None where there are too few pictures."""
        everything = [one for row in rows.values() for one in row]
        num_drawn = sum(one.is_drawn for one in everything)
        if metric == "inception_score":
            if num_drawn < SPLITS:
                return None
            return set_interval(rows, self._inception_score, resamples=WIDE_RESAMPLES, seed=self.seed)
        if min(num_drawn, len(everything) - num_drawn) < 2:
            return None
        rows = _reduce(rows)
        width = len(next(iter(rows.values()))[0].values_D)
        resamples = WIDE_RESAMPLES if width > WIDE else SET_RESAMPLES
        interval = set_interval(rows, _distance, resamples=resamples, seed=self.seed)
        return replace(interval, n=num_drawn)

    def _inception_score(self, features: list[_Feature]) -> float:
        if len(features) < SPLITS:  # of a resample
            return float("nan")
        torch.manual_seed(self.seed)  # the parts are random
        return frechet.inception_score_of(torch.stack([one.values_D for one in features]), splits=SPLITS)[0]


def _sorted(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows in a fixed order, in whatever order they were answered."""
    return {row: rows[row] for row in sorted(rows)}


def _bleu_of(order: int) -> Callable[[list[tuple[str, str]]], float]:
    return lambda pairs: text.bleu([said for said, _ in pairs], [true for _, true in pairs], order=order)


def _distance(features: list[_Feature]) -> float:
    """The Frechet distance of the drawn from the true ones; NaN where a resample has too few."""
    drawn, true = ([one.values_D for one in features if one.is_drawn == side] for side in (True, False))
    if min(len(drawn), len(true)) < 2:
        return float("nan")
    return frechet.frechet_distance(torch.stack(true), torch.stack(drawn))


def _reduce(rows: dict[str, list[_Feature]]) -> dict[str, list[_Feature]]:
    everything_ND = torch.stack([one.values_D for row in rows.values() for one in row])
    reduced = iter(frechet.in_their_span(everything_ND))
    return {name: [_Feature(one.is_drawn, next(reduced)) for one in row] for name, row in rows.items()}
