"""A vision-language model is trained on own rows in both stages, without the stage "vision", and then serves."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from batch_jobs import precompute
from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_stable_diffusion
from minigpt5 import MiniGPT5, new
from minigpt5.model.folder_config import load_config
from minigpt5.objective.encoders import find_encoders
from minigpt5.story.stream import write_story
from minigpt5.types import DrawSettings, InputImage, StoryRequest
from tests.helpers.tiny_vision_language import HIDDEN, IMAGE_PX, MAKERS, make_vision_language
from training.train import main

QUICKLY_TRAINED = ("qwen2_5_vl",)
"""Families that are trained in every run of the tests; the others are marked as slow."""
ONE_STEP = DrawSettings(steps=1)
QUICK = ["--workers", "0", "steps=2", "batch_size=2", "num_threads=1", "warmup_steps=1", "validation_batches=0"]
QUICK += ["draws_samples=false", "log_every=1"]


families = pytest.mark.parametrize(
    "made",
    [kind if kind in QUICKLY_TRAINED else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(MAKERS)],
    indirect=True,
)


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = getattr(request, "param", "qwen2_5_vl")
    make_vision_language(kind, tmp_path / "base")
    make_stable_diffusion(tmp_path / "stable-diffusion")
    options = ["--language", str(tmp_path / "base"), "--diffusion", str(tmp_path / "stable-diffusion")]
    options += ["--image-px", str(IMAGE_PX[kind]), "--context", "2048", "--out", str(tmp_path / "made")]
    assert new.main(options, show=lambda text: None) == 0
    return tmp_path / "made"


@pytest.fixture
def encoded(made: Path, tmp_path: Path) -> Path:
    """Captions and stories, with what the encoders make of their pictures."""
    for number, kind in enumerate(("caption", "story")):
        part = Part(number=number, file="", start=0, count=8)
        write_part(part, layout=f"storybook:{kind}", uri="", output=str(tmp_path / "plain"), seed=3)
    options = {"model": str(made), "keeps_pictures": False}
    precompute.begin(str(tmp_path / "plain"), str(tmp_path / "encoded"), **options)
    encode = precompute.Encode(
        source=str(tmp_path / "plain"), output=str(tmp_path / "encoded"), num_threads=1, **options
    )
    for path in sorted((tmp_path / "plain" / "rows").iterdir()):
        assert encode({"file": str(path)})["files"] == 1
    return tmp_path / "encoded"


def test_rows_store_the_embeddings_that_the_language_model_reads(encoded: Path) -> None:
    num_embeddings = (IMAGE_PX["qwen2_5_vl"] // 4) ** 2
    rows = [row for path in sorted((encoded / "rows").iterdir()) for row in parquet.read_table(path).to_pylist()]
    stored = [one["features"] for row in rows for one in row["segments"] if one["text"] is None]
    assert {np.load(io.BytesIO(data)).shape for data in stored} == {(num_embeddings, HIDDEN)}


@families
def test_both_stages_train_it_and_it_writes_reads_and_draws(
    made: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(encoded)]
    align, learn = tmp_path / "align", tmp_path / "learn"
    capsys.readouterr()
    assert main(["align", *data, "--start", str(made), "--out", str(align), *QUICK]) == 0
    start = ["--start", str(align / "model"), "--out", str(learn)]
    assert main(["learn", *data, *start, *QUICK, "story_share=0.5"]) == 0
    assert "do not say which" not in capsys.readouterr().out, "the rows name their encoders"
    lines = [json.loads(line) for line in (learn / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    for stage, names in ((align, set()), (learn, {"adapter"})):
        assert {path.name for path in (stage / "model").iterdir()} == {
            "config.json",
            "vokens.safetensors",
            "mapper.safetensors",
        } | names
    adapter = load_file(learn / "model" / "adapter" / "adapter_model.safetensors")
    assert {name.split("layers.")[0] for name in adapter} == {"base_model.model."}, "of the text half alone"
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    before, after = (load_file(folder / "vokens.safetensors")["embedding"] for folder in (made, learn / "model"))
    assert (before != after).any()

    model = MiniGPT5.from_pretrained(learn / "model")
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    request = StoryRequest(
        prompt=("A fox", InputImage(data=file.getvalue())), pages=2, seed=1, feedback="pictures", draw=ONE_STEP
    )
    story = asyncio.run(
        write_story(request, model.generator.generate, model.decoder.decode, story_id="own", model=model.config.name)
    )
    assert [page.picture.width for page in story.pages if page.picture] == [32, 32]
    assert model.describe(file.getvalue()) is not None


def test_the_stage_vision_has_nothing_to_train(
    made: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not load_config(made).vision.has_qformer
    assert main(["vision", "--data", str(encoded), "--start", str(made), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "reads pictures as its base model does" in error and error.count("\n") == 1


def test_rows_of_another_vision_language_model_are_refused(
    made: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of equal shapes, one weight of whose tower differs."""
    config = load_config(made)
    encoders = find_encoders(made, config)
    assert encoders.vision and encoders.vision.sha256 == config.bases[0].sha256 != encoders.vae.sha256
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    next(base.model.visual.parameters()).data.add_(1)
    base.save_pretrained(tmp_path / "base")
    other = tmp_path / "other"
    options = ["--language", str(tmp_path / "base"), "--diffusion", str(tmp_path / "stable-diffusion")]
    options += ["--image-px", str(IMAGE_PX["qwen2_5_vl"]), "--context", "2048", "--out", str(other)]
    assert new.main(options, show=lambda text: None) == 0
    assert find_encoders(other, load_config(other)).vae == encoders.vae
    capsys.readouterr()
    data = ["--data", str(encoded), "--start", str(other)]
    assert main(["align", *data, "--out", str(tmp_path / "align"), *QUICK]) == 0, "it reads no pictures"
    capsys.readouterr()
    assert main(["learn", *data, "--out", str(tmp_path / "learn"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert "encoded by another vision encoder" in error and error.count("\n") == 1
