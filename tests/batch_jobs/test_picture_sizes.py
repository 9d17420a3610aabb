"""Pictures of any size in bulk jobs, by real engines of tiny size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from batch_jobs import redraw
from batch_jobs.inputs import RawRow, StoryJob, check_rows
from batch_jobs.job import Output
from batch_jobs.monitor import Monitor
from batch_jobs.outputs import STORY_SCHEMA
from batch_jobs.stages import DRAW_COLUMNS, PAGE_SCHEMA, Draw, Write, as_table
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.errors import InvalidRequest
from minigpt5.story.voken_file import unpack
from minigpt5.types import DrawRequest, DrawSettings, Picture, Reference
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from tests.minigpt5.engine.test_generator import new_generator

CONFIG = tiny_config()  # draws 32 x 32, and sizes of multiples of 8 up to 64 x 48 pixels
SIZES = {"own": None, "wide": (48, 32), "resampled": (96, 64)}


def new_decoder() -> DiffusionDecoder:
    return DiffusionDecoder(CONFIG, tiny_mapper(CONFIG), tiny_diffusion(CONFIG))


def test_each_row_has_pictures_of_its_own_size_as_the_engine_draws_them(tmp_path: Path) -> None:
    rows = [
        {"id": name, "prompt": "a fox", "pages": 1, "seed": 1, "steps": 2}
        | ({"width": size[0], "height": size[1]} if size else {})
        for name, size in SIZES.items()
    ]
    jobs = [job for job in check_rows((RawRow(values=row) for row in rows), CONFIG) if isinstance(job, StoryJob)]
    assert len(jobs) == 3
    output = Output.at(str(tmp_path / "out"), STORY_SCHEMA, {"job": "illustrate"})
    write = Write(new_generator, CONFIG.sampling, store=output.store, watch=Monitor())
    draw = Draw(new_decoder, store=output.store, watch=Monitor())
    written = [row for table in write(as_table(jobs)) for row in table.to_pylist() if row["page"]]
    alone = new_decoder()
    for row in written:
        (drawn,) = [one for table in draw(pa.Table.from_pylist([row], schema=PAGE_SCHEMA)) for one in table.to_pylist()]
        assert drawn["has_picture"], drawn["error"]
        picture = Image.open(io.BytesIO(output.store.load_picture(row["id"], 1)))
        assert picture.size == (SIZES[row["id"]] or (32, 32))
        settings = DrawSettings(**{name: row[name] for name in DRAW_COLUMNS})
        [expected] = alone.draw(
            [DrawRequest(vokens=unpack(row["vokens"], page=1), seed=row["seed"], settings=settings)]
        )
        assert isinstance(expected, Picture) and expected.is_resampled == (row["id"] == "resampled")
        assert (
            max(
                abs(a - b)
                for a, b in zip(Image.open(io.BytesIO(expected.png)).tobytes(), picture.tobytes(), strict=True)
            )
            <= 1
        )


def test_pages_of_a_consistent_story_are_drawn_beside_the_first_in_every_run(tmp_path: Path) -> None:
    rows = [
        {"id": name, "prompt": "a fox", "pages": 3, "seed": 1, "steps": 2, "consistency": name}
        for name in ("story", "off", "yes")
    ]
    *jobs, bad = check_rows((RawRow(values=row) for row in rows), CONFIG)
    assert "consistency is 'yes' but must be" in bad.error  # type: ignore[union-attr]
    output = Output.at(str(tmp_path / "out"), STORY_SCHEMA, {"job": "illustrate"})
    write = Write(new_generator, CONFIG.sampling, store=output.store, watch=Monitor())

    def pages() -> list[dict[str, Any]]:
        return [row for table in write(as_table(jobs)) for row in table.to_pylist() if row["page"]]  # type: ignore[arg-type]

    written = pages()
    assert [(row["id"], row["page"], row["reference"] is not None) for row in written] == [
        *(("story", page, page > 1) for page in (1, 2, 3)),
        *(("off", page, False) for page in (1, 2, 3)),
    ]
    stored = pages()  # of a second run, which finds the texts and vokens of the first
    assert [(row["vokens"], row["reference"], row["reference_seed"]) for row in stored] == [
        (row["vokens"], row["reference"], row["reference_seed"]) for row in written
    ]
    draw = Draw(new_decoder, store=output.store, watch=Monitor())
    for row in written:
        draw.draw(row)
    found = {(name, page): output.store.load_picture(name, page) for name in ("story", "off") for page in (1, 2, 3)}
    assert found["story", 1] == found["off", 1]
    first, second = (unpack(row["vokens"], page=row["page"]) for row in written[:2])
    settings = DrawSettings(**{name: written[1][name] for name in DRAW_COLUMNS})
    [expected] = new_decoder().draw(
        [
            DrawRequest(
                vokens=second,
                seed=written[1]["seed"],
                settings=settings,
                reference=Reference(vokens=first, seed=written[0]["seed"]),
            )
        ]
    )
    assert found["story", 2] == expected.png != found["off", 2]


def test_a_data_set_that_is_drawn_again_may_be_consistent() -> None:
    settings = CONFIG.draw_settings({})
    stored = [{"index": page, "text": "One.", "vokens": bytes([page]), "seed": page, "error": None} for page in (1, 2)]
    for consistency, expected in (("off", [None, None]), ("story", [None, (bytes([1]), 1)])):
        fetch = redraw.Fetch(uri="", ids=frozenset("a"), settings=settings, seed=None, consistency=consistency)  # type: ignore[arg-type]
        *pages, _ = fetch.pages({"id": "a", "pages": stored, "error": None, "kind": None})
        found = [(row["reference"], row["reference_seed"]) if row.get("reference") else None for row in pages]
        assert found == expected


def test_a_data_set_is_drawn_again_in_another_size() -> None:
    options = redraw.make_parser().parse_args(["stories", "--output", "out", "--width", "48"])
    settings = CONFIG.draw_settings({"width": options.width})
    fetch = redraw.Fetch(uri="", ids=frozenset("a"), settings=settings, seed=None)
    page = {"index": 1, "text": "One.", "vokens": b"", "seed": 1, "error": None}
    first, closing = fetch.pages({"id": "a", "pages": [page], "error": None, "kind": None})
    assert {name: first[name] for name in ("width", "height")} == {"width": 48, "height": 0}
    assert closing["page"] == 0
    with pytest.raises(InvalidRequest, match="width is 9 but must be from 32 to 4096"):
        CONFIG.draw_settings({"width": 9})
