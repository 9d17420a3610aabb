"""A picture is the same through every door: both HTTP routes, bulk jobs, and training."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from batch_jobs.inputs import ImageJob
from batch_jobs.monitor import Monitor
from batch_jobs.precompute import Encode
from batch_jobs.prepare import Part, write_part
from batch_jobs.stages import Tell, as_table, jobs_of
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.image_transforms import fit_drawn, fit_read
from minigpt5.model.vision import Vision
from minigpt5.objective.losses import LossWeights
from minigpt5.types import InputImage, Sampling, StoryRequest
from tests.helpers.batch_fakes import FakeGenerator
from tests.helpers.picture_files import bad_files, good_files
from tests.helpers.served import Served, data_url
from tests.helpers.tiny import save_tiny, tiny_language, tiny_tokenizer, tiny_vision
from tests.minigpt5.objective.test_losses import new_objective
from training.data.stored import to_example

GOOD, BAD = good_files(), bad_files()
READ_PX, DRAW_PX = 224, 128


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("stories"))


class Listener(FakeGenerator):
    """Keeps the pictures that it is to describe."""

    def __init__(self) -> None:
        self.pictures: list[bytes] = []

    def validate_request(self, request: StoryRequest) -> None:
        self.pictures += [part.data for part in request.prompt if isinstance(part, InputImage)]


def ask_chat(served: Served, data: bytes) -> Any:
    parts = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": data_url(data)}}]
    return served.post({"messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions")


def ask_for_a_story(served: Served, data: bytes) -> Any:
    return served.post(
        {"prompt": [{"type": "image", "image": data_url(data)}, {"type": "text", "text": "A"}], "pages": 1}
    )


def told(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What `describe` makes of a picture, and what its engine was given."""
    listener = Listener()
    tell = Tell(lambda: listener, Sampling(), watch=Monitor())
    (job,) = jobs_of(as_table([ImageJob(row=1, id="a", image=data, question="Who?")]), ImageJob)
    return tell.tell(job), listener.pictures


def prepare(folder: Path, data: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and rejects of a story of two pages that both have this picture."""
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "1.png").write_bytes(data)
    pages = [{"text": text, "picture": "1.png"} for text in ("One.", "Two.")]
    (folder / "in" / "story.jsonl").write_text(json.dumps({"id": "s", "pages": pages}))
    part = Part(number=0, file="story.jsonl", start=0, count=1)
    write_part(part, layout="folder", uri=str(folder / "in"), output=str(folder / "out"), seed=1)
    found = []
    for kind in ("rows", "rejects"):
        paths = sorted((folder / "out" / kind).glob("*.parquet"))
        found.append([row for path in paths for row in parquet.read_table(path).to_pylist()])
    return found[0], found[1]


def example_of(row: dict[str, Any], *, draw_px: int = DRAW_PX) -> Any:
    """The first example of a row that reads one picture and draws one."""
    examples = (
        to_example(row, np.random.default_rng(seed), stage="learn", story_share=0, read_px=READ_PX, draw_px=draw_px)
        for seed in range(100)
    )
    return next(one for one in examples if len(one.read) == len(one.drawn) == 1)


@pytest.mark.parametrize("kind", GOOD)
def test_a_picture_is_the_same_through_every_door(kind: str, served: Served, tmp_path: Path) -> None:
    data = GOOD[kind].data
    handed_on = []
    for reply in (ask_chat(served, data), ask_for_a_story(served, data)):
        assert reply.status_code in (200, 201), reply.text
        handed_on += [part.data for part in served.generator.requests[-1].prompt if isinstance(part, InputImage)]
    caption, given = told(data)
    assert caption["error"] is None
    rows, rejects = prepare(tmp_path, data)
    assert len(handed_on) == 2 and len(given) == 1 and not rejects
    example = example_of(rows[0])
    assert all((fit_read(one, READ_PX) == example.read[0]).all() for one in [*handed_on, *given])
    assert (fit_drawn(data, DRAW_PX) == example.drawn[0]).all()
    assert (fit_read(data, READ_PX) == example.read[0]).all()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_refused_alike_at_every_door(kind: str, served: Served, tmp_path: Path) -> None:
    data, fault = BAD[kind]
    for reply in (ask_chat(served, data), ask_for_a_story(served, data)):
        assert reply.status_code in (400, 422) and fault in reply.json()["error"]["message"], reply.text
    caption, given = told(data)
    assert fault in caption["error"] and caption["kind"] == "input" and not given
    rows, rejects = prepare(tmp_path, data)
    assert not rows and fault in rejects[0]["reason"] and rejects[0]["reason"].startswith("bad picture: 1.png ")


def test_serving_training_and_bulk_show_the_encoder_the_same_pixels(tmp_path: Path) -> None:
    """A picture that is not square, turned, and transparent: bit-equal at the vision encoder."""
    config = save_tiny(tmp_path / "model")
    data = GOOD["png-rgba"].data
    rows, _ = prepare(tmp_path / "rows", data)
    seen: dict[str, torch.Tensor] = {}

    def watch(vision: Vision, door: str) -> None:
        vision.encoder.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(door, inputs[0].clone()))

    vision = tiny_vision(config)
    watch(vision, "serving")
    generator = VokenGenerator(config, tiny_tokenizer(config), tiny_language(config), vision)
    request = StoryRequest(prompt=(InputImage(data=data), "Who?"), pages=1, sampling=Sampling(max_page_tokens=4))

    async def generate() -> None:
        async for _ in generator.generate(request):
            pass

    asyncio.run(generate())

    objective = new_objective()
    watch(objective.vision, "training")
    example = example_of(rows[0], draw_px=config.image_px)
    objective([example], LossWeights(text=1, picture=0, caption=1))

    encode = Encode(
        model=str(tmp_path / "model"),
        source=str(tmp_path / "rows" / "out"),
        output=str(tmp_path / "encoded"),
        keeps_pictures=False,
        num_threads=1,
    )
    watch(encode.vision, "bulk")
    (path,) = (tmp_path / "rows" / "out" / "rows").iterdir()
    encode({"file": str(path)})

    assert set(seen) == {"serving", "training", "bulk"}
    assert torch.equal(seen["serving"], seen["training"])
    assert torch.equal(seen["bulk"], seen["serving"].expand(2, -1, -1, -1))
