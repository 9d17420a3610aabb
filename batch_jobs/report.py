"""How far a run is, and what it did: the line in the terminal and the figures at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from batch_jobs.monitor import Figures, summary
from batch_jobs.stages import Row


@dataclass
class Report:
    """What a run did."""

    rows: int = 0
    skipped: int = 0
    """Rows that an earlier run has finished."""
    done: int = 0
    """Rows that this run has finished, those with errors included."""
    stories: int = 0
    """Rows with something in them: pages, a caption, or answers."""
    pictures: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    """Rows with an error, by its kind."""
    figures: Figures = field(default_factory=Figures)
    gpus: dict[str, float] = field(default_factory=dict)
    """GPUs of one engine of each pool."""
    left: int = 0
    """Rows that met a store that failed for too long: the next run does them."""
    left_because: str = ""
    """The first such failure."""
    stopped_at: int | None = None
    """The number of errors at which the run gave up."""

    @property
    def errors(self) -> int:
        return self.kinds.total()

    def add(self, row: Row) -> None:
        self.done += 1
        pages = row.get("pages") or []
        self.stories += bool(pages or row.get("caption") or row.get("answers"))
        self.pictures += row.get("num_pictures") or 0
        self.pictures += sum(bool(page["has_picture"]) for page in pages)
        if row["error"] is not None:
            self.kinds[row.get("kind") or "other"] += 1

    def leave(self, row: Row) -> None:
        """Count a row that is left to the next run."""
        self.left += 1
        self.left_because = self.left_because or str(row["error"])

    def progress(self) -> str:
        """One line while the run is under way, with what remains."""
        finished, left = self.skipped + self.done, self.rows - self.skipped - self.done
        pace = f", about {clock(left * self.seconds / self.done)} left" if self.done and left else ""
        made = f"{self.errors} errors, {self.pictures} pictures"
        return f"{finished} of {self.rows} rows, {made}, {clock(self.seconds)}{pace}"

    def counts(self) -> dict[str, Any]:
        """For the manifest."""
        per_s = 1 / self.seconds if self.seconds else 0.0
        return {
            "rows": self.rows,
            "skipped": self.skipped,
            "done": self.done,
            "errors": self.errors,
            "errors_by_kind": dict(self.kinds),
            "pictures": self.pictures,
            "seconds": round(self.seconds, 2),
            "rows_per_s": round(self.done * per_s, 3),
            "pictures_per_s": round(self.pictures * per_s, 3),
            "pools": summary(self.figures, num_pictures=self.pictures or self.stories, gpus=self.gpus),
        }

    def __str__(self) -> str:
        counts = self.counts()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{self.rows} rows, {self.skipped} already there, {self.errors} errors{f' ({kinds})' if kinds else ''}, "
            f"{self.pictures} pictures, {self.done} rows in {self.seconds:.1f} s: {counts['rows_per_s']:.2f} rows/s, "
            f"{counts['pictures_per_s']:.2f} pictures/s"
        ]
        for name, pool in counts["pools"].items():
            cost = f", {pool['core_s_per_page']:.3f} core-seconds a page" if pool["core_s_per_page"] else ""
            cost += f", {pool['gpu_s_per_page']:.3f} GPU-seconds a page" if pool["gpu_s_per_page"] else ""
            lines.append(
                f"  {name}: {pool['engines']} engines, {pool['utilisation']:.0%} busy, {pool['deaths']} deaths{cost}"
            )
        return "\n".join(lines)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
