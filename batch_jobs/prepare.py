"""Data sets of any known layout -> training rows, as a Ray Data job.

    python -m batch_jobs.prepare cc3m captions.tsv --output /data/cc3m
    python -m batch_jobs.prepare storybook:story --limit 2000 --output /data/stories

Writes OUTPUT/rows/*.parquet (stored_example.py), OUTPUT/rejects/*.parquet with each broken row and the reason,
and OUTPUT/manifest.json with the counts. A part that is written is never written again: the same command goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from batch_jobs.dataset_readers import DATASET_READERS, STORYBOOK, Source, read_items, storybook_item
from batch_jobs.pipeline import connect
from minigpt5.commands import check_kept, positive
from minigpt5.errors import InvalidRequest, MiniGPT5Error
from minigpt5.objective.stored_example import REJECT_SCHEMA, ROW_SCHEMA, BadRow, Item, as_unicode, to_row
from minigpt5.storage import open_place, read_json, write_whole

PART_ITEMS = 1_000
GROUP_ROWS = 64
"""Rows of a parquet row group, which is what training reads at once."""
FORMAT = 3
"""Raised by one whenever the same source would give other rows than before."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Items of one file of the source that become one file of rows."""

    number: int
    file: str
    start: int
    count: int


def items_of(layout: str, uri: str, part: Part, *, seed: int) -> Iterator[Item]:
    if layout.startswith("storybook:"):
        for index in range(part.start, part.start + part.count):
            yield storybook_item(layout.partition(":")[2], index, seed)
        return
    items = read_items(layout, Source(uri), part.file)
    yield from itertools.islice(items, part.start, part.start + part.count)


def write_part(part: Part, *, layout: str, uri: str, output: str, seed: int) -> dict[str, Any]:
    """Read a part, write its rows and its rejects; the counts. Does nothing but count where that is done already."""
    files, folder = open_place(output)
    name = f"part-{part.number:06d}"
    done = f"{folder}/parts/{name}.json"
    if (counts := read_json(files, done)) is not None:
        return counts
    source = None if layout.startswith("storybook:") else Source(uri)
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    kinds: Counter[str] = Counter()
    seen: set[str] = set()
    for item in items_of(layout, uri, part, seed=seed):
        try:
            row = to_row(item, source=layout, read=source.read if source else _nothing)
            if item.id in seen:
                raise BadRow("a second row with this id")
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


def to_parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    file = io.BytesIO()
    # Pictures are compressed already; small groups are what training picks rows out of.
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=GROUP_ROWS, compression="zstd")
    return file.getvalue()


def _nothing(name: str) -> bytes:
    raise FileNotFoundError(name)


def count_items(file: str, *, layout: str, uri: str) -> int:
    return sum(1 for _ in read_items(layout, Source(uri), file))


def plan(layout: str, uri: str, *, limit: int | None) -> list[Part]:
    """All parts. Raises InvalidRequest where the source is not of this layout."""
    if layout.startswith("storybook:"):
        if limit is None:
            raise InvalidRequest("limit", "the picture world has no end: say how many rows with --limit")
        sizes = {"": limit}
    else:
        import ray

        names = DATASET_READERS[layout].files(Source(uri))
        if not names:
            raise InvalidRequest("source", f"source is {uri}, and there is nothing of layout {layout} in it")
        counting = ray.data.from_items([{"file": name} for name in names]).map(
            lambda row: {**row, "count": count_items(row["file"], layout=layout, uri=uri)}
        )
        sizes = {row["file"]: row["count"] for row in sorted(counting.take_all(), key=lambda row: row["file"])}
        if not any(sizes.values()):
            raise InvalidRequest("source", f"source is {uri}, and its files of layout {layout} have no rows")
    parts: list[Part] = []
    left = sum(sizes.values()) if limit is None else limit
    for name, size in sizes.items():
        for start in range(0, size, PART_ITEMS):
            count = min(PART_ITEMS, size - start, left)
            if count > 0:
                parts.append(Part(number=len(parts), file=name, start=start, count=count))
            left -= max(0, count)
    return parts


def prepare(layout: str, uri: str, output: str, *, limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """The whole job; returns the manifest. Raises InvalidRequest, also where OUTPUT holds another data set."""
    import ray

    check_kept(output, option="--output")
    connect(0)
    files, folder = open_place(output)
    asked = {"format": FORMAT, "layout": layout, "source": uri, "limit": limit, "seed": seed}
    begun = read_json(files, f"{folder}/plan.json")
    if begun is not None and begun != asked:
        changed = sorted(key for key in asked if begun.get(key) != asked[key])
        raise InvalidRequest("output", f"{output} holds another data set ({', '.join(changed)} differ): name another")
    parts = plan(layout, uri, limit=limit)
    write_whole(files, f"{folder}/plan.json", json.dumps(asked).encode())
    work = partial(write_part, layout=layout, uri=uri, output=output, seed=seed)
    dataset = ray.data.from_items([vars(part) for part in parts], override_num_blocks=max(1, len(parts)))
    total: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for counts in dataset.map(lambda row: {"counts": json.dumps(work(Part(**row)))}).iter_rows():
        values = json.loads(counts["counts"])
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
