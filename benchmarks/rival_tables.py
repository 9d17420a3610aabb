"""Tables of benchmarks/results/rivals.json."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import Results, table

ORDER = (
    *("minigpt5", "gill", "divter", "two-stage"),
    *("no-caption-loss", "no-diffusion-loss", "no-guidance-dropout", "no-stage-1"),
    *("stable-diffusion", "text-only", "minigpt4", "no-transformer", "vokens-1", "vokens-4", "vokens-16"),
    *("frozen", "prefix", "full", "data-10", "data-30", "shipped"),
)
"""Rows, in the order in which the bench makes them."""
CAPTIONS = {
    **{name: f"caption_{name}" for name in ("who", "what", "side", "place", "time", "all")},
    "LPIPS": "lpips",
    "distance": "efficientnet_distance",
}
STORIES = {
    "facts named": "story_named",
    "facts referred to": "story_referred",
    "draws: precision": "draw_precision",
    "recall": "draw_recall",
    "BLEU-1": "bleu_1",
    "ROUGE-L": "rouge_l",
    "METEOR": "meteor",
}
SHORT = {
    "minigpt5": "MiniGPT-5: vokens",
    "gill": "GILL: captions alone train the mapper",
    "divter": "Divter: a written description is drawn",
    "two-stage": "two stages: the text itself is drawn",
    "shipped": "*the shipped model, trained far longer*",
}
"""Rows of the README, and what they are."""


def rival_extract(found: Results) -> str:
    """The rows of the README: what each way shows of a caption, of a page, and of the pages before it."""
    shown = [row for row in found["rivals"]["rows"] if row["name"] in SHORT]
    columns = ("caption_all", "story_named", "story_referred")
    return table(
        ("way, trained here at one small budget", "all facts of a caption", "of a page", "of earlier pages"),
        ((SHORT[row["name"]], *(_cell(row["metrics"][name]) for name in columns)) for row in shown),
    )


def rival_captions(found: Results) -> str:
    """Pictures of captions."""
    return _metrics(found, CAPTIONS)


def rival_stories(found: Results) -> str:
    """Pictures of pages after earlier ones, and replies."""
    return _metrics(found, STORIES)


def rival_costs(found: Results) -> str:
    """What each row took, and which rows are still to be run."""
    rows = found["rivals"]["rows"]
    lines = table(
        ("row", "seeds", "minutes of a seed: steps, measuring", "most memory"),
        (
            (row["name"], len(row["seeds"]), f"{row['minutes']:g}", f"{row['peak_mib'] / 1024:.2f} GiB")
            for row in rows
            if row["peak_mib"]  # else nothing was trained
        ),
    )
    left = [name for name in ORDER if name not in {row["name"] for row in rows}]
    return lines + (f"\nNot run yet: {', '.join(left)}.\n" if left else "")


def _metrics(found: Results, columns: dict[str, str]) -> str:
    """The rows that do any of these."""
    rows = [row for row in found["rivals"]["rows"] if any(row["metrics"][name] for name in columns.values())]
    return table(
        ("row", *columns),
        ((row["name"], *(_cell(row["metrics"][name]) for name in columns.values())) for row in rows),
    )


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    digits = 1 if figure["mean"] >= 10 else 2
    return f"{figure['mean']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
