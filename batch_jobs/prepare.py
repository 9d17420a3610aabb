"""Data sets of any known layout -> training rows, as a Ray Data job.

    python -m batch_jobs.prepare cc3m captions.tsv --output /data/cc3m
    python -m batch_jobs.prepare storybook:story --limit 2000 --output /data/stories

Writes OUTPUT/rows/*.parquet (stored_example.py), OUTPUT/rejects/*.parquet with each broken row and the reason,
and OUTPUT/manifest.json with the counts. A part that is written is never written again: the same command goes on where
it was stopped. It is refused where the files of the source have changed since: OUTPUT/plan.json notes them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from batch_jobs.dataset_readers import DATASET_READERS, STORYBOOK, Source, read_items, storybook_item
from batch_jobs.inputs import check_seed
from batch_jobs.pipeline import connect
from minigpt5.commands import check_kept, positive
from minigpt5.errors import InvalidRequest, MiniGPT5Error
from minigpt5.objective.stored_example import REJECT_SCHEMA, ROW_SCHEMA, BadRow, Item, as_unicode, to_row
from minigpt5.storage import open_place, read_json, write_whole

PART_ITEMS = 1_000
GROUP_ROWS = 64
"""Rows of a parquet row group, which is what training reads at once."""
FORMAT = 4
"""Raised by one whenever the same source would give other rows than before."""
EARLIER_FORMAT = 3
"""Its outputs note no files. They differ from today's in rows that repeat an id, which were rejects in cc3m."""
REPEATED_ID = "a second row with this id"
TASKS_PER_CPU = 4
MAX_RUNS = 16
"""Runs of one file. Each reads the file from its beginning, and passes over what comes before its first part."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Items of one file of the source that become one file of rows."""

    number: int
    file: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a file of the source is known by. Example: Measured(items=5, size_bytes=310)"""

    items: int
    size_bytes: int


class ItemReader:
    """Items of a source by parts. Parts that follow one another in a file are read in one go."""

    def __init__(self, *, layout: str, uri: str, seed: int) -> None:
        self.layout, self.seed = layout, seed
        self.source = None if layout.startswith("storybook:") else Source(uri)
        self._file, self._next = "", 0
        self._items: Iterator[Item] | None = None

    def items_of(self, part: Part) -> Iterator[Item]:
        """Use up all of a part's items before you ask for the next part."""
        if self.source is None:
            for index in range(part.start, part.start + part.count):
                yield storybook_item(self.layout.partition(":")[2], index, self.seed)
            return
        if self._items is None or part.file != self._file or part.start < self._next:
            self._items = read_items(self.layout, self.source, part.file)
            self._file, self._next = part.file, 0
        for _ in itertools.islice(self._items, part.start - self._next):
            pass
        self._next = part.start + part.count
        yield from itertools.islice(self._items, part.count)

    def read(self, name: str) -> bytes:
        """A picture of the source. Raises what `Source.read` does."""
        if self.source is None:
            raise FileNotFoundError(name)
        return self.source.read(name)


def write_run(parts: Sequence[Part], *, layout: str, uri: str, output: str, seed: int) -> list[dict[str, Any]]:
    """Write parts of one file in their order, and return the counts of each. Holds one part at a time."""
    reader = ItemReader(layout=layout, uri=uri, seed=seed)
    return [write_part(part, layout=layout, uri=uri, output=output, seed=seed, reader=reader) for part in parts]


def write_part(
    part: Part, *, layout: str, uri: str, output: str, seed: int, reader: ItemReader | None = None
) -> dict[str, Any]:
    """Write the rows and the rejects of a part, and return the counts. A part that is written is counted alone."""
    files, folder = open_place(output)
    name = _name_of(part)
    done = f"{folder}/parts/{name}.json"
    if (counts := read_json(files, done)) is not None:
        return counts
    reader = reader or ItemReader(layout=layout, uri=uri, seed=seed)
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    kinds: Counter[str] = Counter()
    seen: set[str] = set()
    for item in reader.items_of(part):
        try:
            row = to_row(item, source=layout, read=reader.read)
            if item.id in seen:
                raise BadRow(REPEATED_ID)
            seen.add(item.id)
            rows.append(row)
            kinds[item.kind] += 1
        except BadRow as reason:
            rejects.append({"id": item.id, "source": layout, "reason": as_unicode(str(reason))})
    for kind, values, schema in (("rows", rows, ROW_SCHEMA), ("rejects", rejects, REJECT_SCHEMA)):
        if values:
            write_whole(files, f"{folder}/{kind}/{name}.parquet", to_parquet(values, schema))
    pictures = sum(segment["picture"] is not None for row in rows for segment in row["segments"])
    reasons = Counter(reject["reason"].partition(":")[0] for reject in rejects)
    counts = {
        "rows": len(rows),
        "rejects": len(rejects),
        "pictures": pictures,
        "kinds": dict(kinds),
        "reasons": dict(reasons),
    }
    write_whole(files, done, json.dumps(counts).encode())  # last: who finds it finds the rest
    return counts


def _name_of(part: Part) -> str:
    return f"part-{part.number:06d}"


def to_parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    file = io.BytesIO()
    # Pictures are compressed already; small groups are what training picks rows out of.
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=GROUP_ROWS, compression="zstd")
    return file.getvalue()


def count_items(file: str, *, layout: str, uri: str) -> int:
    return sum(1 for _ in read_items(layout, Source(uri), file))


def measure(layout: str, uri: str, *, limit: int | None) -> dict[str, Measured]:
    """The files of a source, in order. Raises InvalidRequest where the source is not of this layout."""
    if layout.startswith("storybook:"):
        if limit is None:
            raise InvalidRequest("limit", "the picture world has no end: say how many rows with --limit")
        return {"": Measured(items=limit, size_bytes=0)}
    import ray

    source = Source(uri)
    names = sorted(DATASET_READERS[layout].files(source))
    if not names:
        raise InvalidRequest("source", f"source is {uri}, and there is nothing of layout {layout} in it")
    sizes = {name: info.size or 0 for name, info in zip(names, source.infos(names), strict=True)}
    counting = ray.data.from_items([{"file": name} for name in names]).map(
        lambda row: {**row, "count": count_items(row["file"], layout=layout, uri=uri)}
    )
    counts = {row["file"]: int(row["count"]) for row in counting.take_all()}
    if not any(counts.values()):
        raise InvalidRequest("source", f"source is {uri}, and its files of layout {layout} have no rows")
    return {name: Measured(items=counts[name], size_bytes=sizes[name]) for name in names}


def plan(sizes: Mapping[str, int], *, limit: int | None) -> list[Part]:
    """All parts of files with so many items."""
    parts: list[Part] = []
    left = sum(sizes.values()) if limit is None else limit
    for name, size in sizes.items():
        for start in range(0, size, PART_ITEMS):
            count = min(PART_ITEMS, size - start, left)
            if count > 0:
                parts.append(Part(number=len(parts), file=name, start=start, count=count))
            left -= max(0, count)
    return parts


def runs_of(parts: Sequence[Part], *, num_tasks: int) -> list[list[Part]]:
    """Parts as runs that a task reads in one go: each of one file, about `num_tasks` of them where files are large."""
    runs: list[list[Part]] = []
    for _, group in itertools.groupby(parts, key=lambda part: part.file):
        of_file = list(group)
        length = max(-(-len(parts) // num_tasks), -(-len(of_file) // MAX_RUNS))
        runs += [of_file[start : start + length] for start in range(0, len(of_file), length)]
    return runs


def check_begun(begun: Mapping[str, Any], asked: Mapping[str, Any], *, output: str) -> None:
    """Raise InvalidRequest where an output was begun by another command."""
    known = {**begun, "format": FORMAT} if _is_earlier(begun) else begun
    if changed := sorted(key for key in asked if known.get(key) != asked[key]):
        raise InvalidRequest("output", f"{output} holds another data set ({', '.join(changed)} differ): name another")


def check_unchanged(
    begun: Mapping[str, Any], measured: Mapping[str, Measured], parts: Sequence[Part], *, uri: str, output: str
) -> None:
    """Raise InvalidRequest where the source is not as it was when the output was begun: parts that are written would
    stand for others."""
    if _is_earlier(begun):
        changes = _changes_since_earlier(measured, parts, uri=uri, output=output)
    else:
        changes = _changes(begun["files"], measured)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise InvalidRequest(
            "output",
            f"the source {uri} has changed since {output} was begun ({', '.join(changes[:3])}{more}): "
            "name another --output",
        )


def _is_earlier(begun: Mapping[str, Any]) -> bool:
    return begun.get("format") == EARLIER_FORMAT and "files" not in begun


def _changes(before: Mapping[str, Mapping[str, int]], measured: Mapping[str, Measured]) -> list[str]:
    changes = []
    for name in sorted({*before, *measured}):
        if name not in before:
            changes.append(f"{name} is new")
        elif name not in measured:
            changes.append(f"{name} is gone")
        elif (was := Measured(**before[name])).items != (now := measured[name]).items:
            changes.append(f"{name or 'it'} had {was.items} items, and has {now.items}")
        elif was != now:
            changes.append(f"{name} had {was.size_bytes} bytes, and has {now.size_bytes}")
    return changes


def _changes_since_earlier(
    measured: Mapping[str, Measured], parts: Sequence[Part], *, uri: str, output: str
) -> list[str]:
    """Of an output that notes no files: what its parts and the times of files tell. Raises InvalidRequest where today
    its rows would have other ids."""
    files, folder = open_place(output)
    expected = {f"{_name_of(part)}.json": part for part in parts}
    infos = files.get_file_info(fs.FileSelector(f"{folder}/parts", allow_not_found=True))
    written = sorted((info for info in infos if info.path.endswith(".json")), key=lambda info: info.path)
    changes = []
    for info in written:
        counts = read_json(files, info.path) or {"rows": 0, "rejects": 0, "reasons": {}}
        if REPEATED_ID in counts["reasons"]:
            raise InvalidRequest(
                "output",
                f"an earlier version began {output}, and rejected rows that repeat an id: name another --output",
            )
        part, count = expected.get(info.base_name), counts["rows"] + counts["rejects"]
        if part is None or part.count != count:
            changes.append(f"{info.base_name.removesuffix('.json')} has {count} items, not {part.count if part else 0}")
    if written and list(measured) != [""]:  # neither the picture world nor a folder of stamps, which has many times
        begun_s = min(info.mtime_ns for info in written)
        names = list(measured)
        infos = Source(uri).infos(names)
        changes += [
            f"{name} is newer" for name, info in zip(names, infos, strict=True) if (info.mtime_ns or 0) > begun_s
        ]
    return changes


def prepare(layout: str, uri: str, output: str, *, limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """The whole job; returns the manifest. Raises InvalidRequest, also where OUTPUT holds another data set."""
    import ray

    check_kept(output, option="--output")
    check_seed(seed)
    connect(0)
    files, folder = open_place(output)
    asked = {"format": FORMAT, "layout": layout, "source": uri, "limit": limit, "seed": seed}
    begun = read_json(files, f"{folder}/plan.json")
    if begun is not None:
        check_begun(begun, asked, output=output)
    measured = measure(layout, uri, limit=limit)
    parts = plan({name: file.items for name, file in measured.items()}, limit=limit)
    if begun is not None:
        check_unchanged(begun, measured, parts, uri=uri, output=output)
    noted = {**asked, "files": {name: vars(file) for name, file in measured.items()}}
    write_whole(files, f"{folder}/plan.json", json.dumps(noted).encode())
    runs = runs_of(parts, num_tasks=TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))))
    work = partial(write_run, layout=layout, uri=uri, output=output, seed=seed)
    jobs = [{"parts": json.dumps([vars(part) for part in run])} for run in runs]
    dataset = ray.data.from_items(jobs, override_num_blocks=max(1, len(jobs)))
    total: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    written = dataset.map(lambda row: {"counts": json.dumps(work([Part(**part) for part in json.loads(row["parts"])]))})
    for run in written.iter_rows():
        for values in json.loads(run["counts"]):
            kinds.update(values.pop("kinds"))
            reasons.update(values.pop("reasons"))
            total.update(values)
    numbers = {key: total[key] for key in ("rows", "rejects", "pictures")}
    manifest = {**asked, **numbers, "kinds": dict(kinds), "reasons": dict(reasons.most_common()), "parts": len(parts)}
    write_whole(files, f"{folder}/manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batch_jobs.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*DATASET_READERS, *(f"storybook:{kind}" for kind in STORYBOOK)]
    parser.add_argument("layout", choices=names, metavar="LAYOUT", help=", ".join(names))
    parser.add_argument("source", nargs="?", default="", help="folder, file or URI (none for storybook)")
    parser.add_argument("--output", required=True, help="folder or URI")
    parser.add_argument("--limit", type=positive, help="so many rows of the source at most")
    parser.add_argument("--seed", type=int, default=1, help="of storybook rows (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        if not options.source and not options.layout.startswith("storybook:"):
            raise InvalidRequest("source", f"{options.layout} needs a source: name its folder or file")
        manifest = prepare(options.layout, options.source, options.output, limit=options.limit, seed=options.seed)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{manifest['rows']} rows with {manifest['pictures']} pictures in {options.output}/rows")
    if manifest["rejects"]:
        print(f"{manifest['rejects']} rejected, see {options.output}/rejects:")
        for reason, count in manifest["reasons"].items():
            print(f"  {count:8}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
