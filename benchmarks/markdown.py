"""Parts of Markdown tables, and what a table is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Results = dict[str, Any]
"""File name without its suffix -> the figures of that file."""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Format a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(figure: dict[str, float]) -> str:
    """Format a share or a mean with its 95 % interval."""
    value = figure["share"] if "share" in figure else figure["mean"]
    return f"{value:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def reached(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"
