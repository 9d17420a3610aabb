"""Results -> one SVG: a bar of wins, ties and losses for each question and pair, and scores of more than two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from minigpt5.evaluation.study.design import QUESTIONS
from minigpt5.evaluation.study.statistics import LEVEL, Estimate, PairResult

WIDTH, LABEL, BAR, STEP, HEAD = 420, 150, 20, 32, 34
"""Pixels: the bars' width, the names beside them, a bar's height, rows' and titles' distance."""
WON, TIED, LOST, INK = "#b5552b", "#e4dccb", "#2b6cb5", "#2e2a25"


def plot(pairs: Sequence[PairResult], scores: Mapping[str, Mapping[str, Estimate] | None]) -> str:
    """Draw the whiskers at the first run's wins, and at each score."""
    parts: list[str] = []
    parts.append(
        _text(
            LABEL,
            16,
            f"Bars: wins of the left run, ties, wins of the right run. Whiskers: {LEVEL:.0%} intervals, "
            "under a bar of the left run's wins.",
        )
    )
    y = 16
    for question, rows in groupby(pairs, key=lambda pair: pair.question):
        y += HEAD
        parts.append(_text(LABEL, y - 10, QUESTIONS[question][0], bold=True))
        for pair in rows:
            parts += _bar(y, pair)
            y += STEP
    known = {question: one for question, one in scores.items() if one}
    ends = [end for one in known.values() for score in one.values() for end in (score.low, score.high)]
    for question, one in known.items():
        y += HEAD
        parts.append(_text(LABEL, y - 10, f"{QUESTIONS[question][0]}: Bradley-Terry score", bold=True))
        for run, score in one.items():
            parts += _dot(y, run, score, low=min(0.0, *ends), high=max(0.0, *ends))
            y += STEP
    size = f"{2 * LABEL + WIDTH} {y + 12}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12" '
        f'fill="{INK}">\n<title>Win rates of a human study, with intervals</title>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(y: int, pair: PairResult) -> list[str]:
    """Wins of the first from the left, losses to the right, and ties between."""
    parts = [
        _text(LABEL - 8, y + 14, pair.first, anchor="end"),
        _text(LABEL + WIDTH + 8, y + 14, pair.second),
    ]
    left = float(LABEL)
    for share, colour in ((pair.wins, WON), (pair.ties, TIED), (pair.losses, LOST)):
        width = share.value * WIDTH
        parts.append(f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        if share.value >= 0.08:
            ink = INK if colour == TIED else "#ffffff"
            parts.append(_text(left + width / 2, y + 14, f"{share.value:.0%}", anchor="middle", colour=ink))
        left += width
    low, high = (LABEL + end * WIDTH for end in (pair.wins.low, pair.wins.high))
    return [*parts, _whisker(low, high, y + BAR + 4)]


def _dot(y: int, run: str, score: Estimate, *, low: float, high: float) -> list[str]:
    def place(value: float) -> float:
        return LABEL + (value - low) / ((high - low) or 1) * WIDTH

    zero = place(0)
    return [
        f'<path d="M{zero:.1f} {y - 2}v{STEP}" stroke="{TIED}"/>',
        _text(LABEL - 8, y + 14, run, anchor="end"),
        _whisker(place(score.low), place(score.high), y + 10),
        f'<circle cx="{place(score.value):.1f}" cy="{y + 10}" r="4" fill="{WON}"/>',
        _text(LABEL + WIDTH + 8, y + 14, f"{score.value:+.2f}"),
    ]


def _whisker(left: float, right: float, y: float) -> str:
    path = f"M{left:.1f} {y - 3}v6M{left:.1f} {y}H{right:.1f}M{right:.1f} {y - 3}v6"
    return f'<path d="{path}" stroke="{INK}" fill="none"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, colour: str = INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
