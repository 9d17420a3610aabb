"""The best, the worst and some random samples of a run, chosen while they are measured."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.protocols.protocol import Protocol, Sample

PLACES = 8
"""Samples of each sheet."""
THUMBNAIL_PX = 192
MAX_SHOWN = 300
"""Characters of a text."""
Place = tuple[tuple[float, ...], tuple[str, str]]
"""Numbers to sort by, then the row and the key of a sample."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample as a page shows it. Pictures are data URIs, "" for none."""

    row: str
    key: str
    asked: str
    said: str | None
    reference: str | None
    drawn: str
    true: str
    values: dict[str, float]


class Sheets:
    """Samples in three orders, the first PLACES of each. Where the ranking metric is alike, the next ones decide.

    Example: sheets = Sheets(VIST, seed=0); measures.on_measured = sheets.add
    """

    def __init__(self, protocol: Protocol, *, seed: int = 0) -> None:
        self.protocol, self.seed = protocol, seed
        self._sheets: dict[str, dict[tuple[str, str], list[tuple[Place, Shown]]]] = {}
        """By the group of `Protocol.main`, then by title and metric."""

    def add(self, sample: Sample, values: dict[str, float]) -> None:
        """Take in a measured sample."""
        if sample.drawn is None and sample.said is None and not values:
            return
        shown: Shown | None = None
        for group in self._groups():
            if group and group not in sample.groups:
                continue
            for sheet, place in self._places(sample, values).items():
                taken = self._sheets.setdefault(group, {}).setdefault(sheet, [])
                if len(taken) < PLACES or place < taken[-1][0]:
                    shown = shown or to_shown(sample, values)
                    taken.append((place, shown))
                    taken.sort(key=lambda one: one[0])
                    del taken[PLACES:]

    def _groups(self) -> tuple[str, ...]:
        return self.protocol.main or ("",)

    def _places(self, sample: Sample, values: dict[str, float]) -> dict[tuple[str, str], Place]:
        """Where the sample stands in each sheet, the first place being the smallest."""
        name = (sample.row, sample.key)
        digest = hashlib.sha256(f"{self.seed}/{'/'.join(name)}".encode()).digest()
        places: dict[tuple[str, str], Place] = {("Random", ""): ((int.from_bytes(digest[:8], "big") / 2**64,), name)}
        for number, metric in enumerate(self.protocol.sheets):
            if metric in values:
                order = tuple(_loss(one, values) for one in self.protocol.sheets[number:])
                places["Best", metric] = (order, name)
                places["Worst", metric] = (tuple(-one for one in order), name)
        return places

    def chosen(self) -> tuple[str, dict[str, list[Shown]]]:
        """The metric that samples are ranked by, "" for none, and the sheets by their titles."""
        sheets: dict[tuple[str, str], list[tuple[Place, Shown]]]
        sheets = next((self._sheets[group] for group in self._groups() if group in self._sheets), {})
        ranked = {metric for title, metric in sheets if title == "Best"}
        metric = next((name for name in self.protocol.sheets if name in ranked), "")
        titles = {"Best": metric, "Worst": metric, "Random": ""} if metric else {"Random": ""}
        return metric, {title: [shown for _, shown in sheets.get((title, of), [])] for title, of in titles.items()}


def _loss(metric: str, values: dict[str, float]) -> float:
    """Less is better, whatever the metric's own way; 0 where it is not there."""
    is_lower = METRICS[metric.partition("/")[0]].better == "lower"
    return values.get(metric, 0.0) * (1 if is_lower else -1)


def to_shown(sample: Sample, values: dict[str, float]) -> Shown:
    return Shown(
        row=sample.row,
        key=sample.key,
        asked=sample.asked[:MAX_SHOWN],
        said=sample.said if sample.said is None else sample.said[:MAX_SHOWN],
        reference=sample.reference if sample.reference is None else sample.reference[:MAX_SHOWN],
        drawn=thumbnail(sample.drawn),
        true=thumbnail(sample.true),
        values=values,
    )


def thumbnail(pixels: np.ndarray | None) -> str:
    if pixels is None:
        return ""
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
