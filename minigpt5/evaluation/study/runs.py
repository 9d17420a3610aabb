"""Output folders of `python -m batch_jobs.illustrate` -> the stories that several runs have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow import ArrowException, dataset, fs

from minigpt5.errors import MiniGPT5Error
from minigpt5.storage import open_place, read_whole, unusable

COLUMNS = ("id", "prompt", "pages", "error")
"""What is read of batch_jobs' STORY_SCHEMA."""


class StudyError(MiniGPT5Error, ValueError):
    """Runs, a key or answers that make no study; the message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class StoryPage:
    """One page of a run's story. `picture` is a picture file, None where the page has none."""

    text: str
    picture: bytes | None


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A row without its pages."""

    prompt: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Common:
    """Ids that all runs finished with their prompts, and for each run how many ids it kept out of the study."""

    prompts: dict[str, str]
    missing: dict[str, int]
    failed: dict[str, int]


class Run:
    """A finished run: its name, and its rows by id.

    Example: run = Run("ours", "s3://bucket/stories"); pages = run.read(["row-7"])["row-7"]
    """

    def __init__(self, name: str, place: str) -> None:
        """Raises StorageError where the place cannot be read, StudyError where it holds no stories."""
        self.name, self.place = name, place
        files, folder = open_place(place)
        try:
            found = files.get_file_info(fs.FileSelector(folder))
            parts = sorted(info.path for info in found if re.fullmatch(r"part-.*\.parquet", info.base_name))
            if not parts:
                raise StudyError(f"{place} has no part-*.parquet: name the --output of python -m batch_jobs.illustrate")
            self._data = dataset.dataset(parts, filesystem=files)
            if lacking := set(COLUMNS) - set(self._data.schema.names):
                raise StudyError(f"{place} has rows without {', '.join(sorted(lacking))}: they are no stories")
            rows = self._data.to_table(["id", "prompt", "error"]).to_pylist()
        except (OSError, ArrowException) as error:
            raise unusable(place, "cannot be read", error) from error
        self.outlines = {row["id"]: Outline(prompt=row["prompt"], error=row["error"]) for row in rows}
        twice = [id for id, times in Counter(row["id"] for row in rows).items() if times > 1]
        if twice:
            raise StudyError(f"{place} has the row {twice[0]!r} more than once: give each row an id of its own")

    def read(self, ids: Collection[str]) -> dict[str, list[StoryPage]]:
        """Read the pages of some rows, pictures included. Raises StorageError."""
        try:
            wanted = dataset.field("id").isin(list(ids))
            rows = self._data.to_table(["id", "pages"], filter=wanted).to_pylist()
            return {
                row["id"]: [
                    StoryPage(text=page["text"] or "", picture=_picture(page))
                    for page in sorted(row["pages"], key=lambda page: page["index"])
                ]
                for row in rows
            }
        except (OSError, ArrowException) as error:
            raise unusable(self.place, "cannot be read", error) from error


def open_runs(arguments: Sequence[str]) -> list[Run]:
    """Open runs that a command line names as PLACE or NAME=PLACE. Raises StudyError, StorageError."""
    named = [_name_and_place(argument) for argument in arguments]
    if len(named) < 2:
        raise StudyError(f"a study compares at least two runs, and {len(named)} was named: name another one")
    for name, times in Counter(name for name, _ in named).items():
        if times > 1:
            raise StudyError(f"{times} runs are called {name!r}: give them names, as in first={named[0][1]}")
    return [Run(name, place) for name, place in named]


def find_common(runs: Sequence[Run]) -> Common:
    """Match rows by id. Raises StudyError where a row's prompt differs between runs, or no row is left."""
    ids = sorted(set().union(*(run.outlines for run in runs)))
    missing = {run.name: sum(id not in run.outlines for id in ids) for run in runs}
    failed = {run.name: sum(one.error is not None for one in run.outlines.values()) for run in runs}
    prompts: dict[str, str] = {}
    for id in ids:
        outlines = [run.outlines[id] for run in runs if id in run.outlines]
        if len({one.prompt for one in outlines}) > 1:
            raise StudyError(f"row {id!r} has another prompt in another run: run the same input through each model")
        if len(outlines) == len(runs) and all(one.error is None for one in outlines):
            prompts[id] = outlines[0].prompt
    if not prompts:
        raise StudyError(
            f"of {len(ids)} rows none was finished by every run (missing: {_counts(missing)}; failed: "
            f"{_counts(failed)}): run the same input, with an id in each row, through each model"
        )
    return Common(prompts=prompts, missing=missing, failed=failed)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _name_and_place(argument: str) -> tuple[str, str]:
    if named := re.fullmatch(r"([\w.-]+)=(.+)", argument):
        return named[1], named[2]
    return argument.rstrip("/").rpartition("/")[2] or argument, argument


def _picture(page: Mapping[str, Any]) -> bytes | None:
    """Read a page's picture file from its row, or from where the row says that it lies."""
    if page["png"] is not None:
        return bytes(page["png"])
    if page["uri"] is None:
        return None
    files, path = open_place(str(page["uri"]))
    data = read_whole(files, path)
    if data is None:
        raise FileNotFoundError(f"its picture {page['uri']} is gone")
    return data
