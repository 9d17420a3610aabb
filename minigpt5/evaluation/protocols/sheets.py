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
    """Example: sheets = Sheets(VIST, ("lpips",)); measures.on_measured = sheets.add"""

    def __init__(self, protocol: Protocol, *, seed: int = 0) -> None:
        self.protocol, self.seed = protocol, seed
        self._by_metric: dict[str, list[list[tuple[tuple[float, str, str], Shown]]]] = {}
        self._random: list[tuple[tuple[float, str, str], Shown]] = []

    def add(self, sample: Sample, values: dict[str, float]) -> None:
        if self.protocol.main and self.protocol.main not in sample.groups:
            return
        if sample.drawn is None and sample.said is None and not values:
            return
        place = (sample.row, sample.key)
        digest = hashlib.sha256(f"{self.seed}/{'/'.join(place)}".encode()).digest()
        keys = {"random": (int.from_bytes(digest[:8], "big") / 2**64, *place)}
        for metric in self.protocol.sheets:
            if metric in values:
                is_lower = METRICS[metric.partition("/")[0]].better == "lower"
                keys[metric] = (values[metric] if is_lower else -values[metric], *place)
        shown: Shown | None = None
        for name, key in keys.items():
            if name == "random":
                sheets = [(self._random, key)]
            else:
                best, worst = self._by_metric.setdefault(name, [[], []])
                sheets = [(best, key), (worst, (-key[0], *place))]
            for sheet, own in sheets:
                if len(sheet) < PLACES or own < sheet[-1][0]:
                    shown = shown or to_shown(sample, values)
                    sheet.append((own, shown))
                    sheet.sort(key=lambda one: one[0])
                    del sheet[PLACES:]

    def chosen(self) -> tuple[str, dict[str, list[Shown]]]:
        """The metric that samples are ranked by, "" for none, and the sheets by their titles."""
        metric = next((name for name in self.protocol.sheets if name in self._by_metric), "")
        sheets = {"Random": [shown for _, shown in self._random]}
        if metric:
            best, worst = ([shown for _, shown in sheet] for sheet in self._by_metric[metric])
            sheets = {"Best": best, "Worst": worst, **sheets}
        return metric, sheets


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
