"""Folders made from bases of every decoder family: aligned on own rows for ten steps, then a story is drawn."""

from __future__ import annotations

import importlib
import io
import json
import pkgutil
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from batch_jobs import precompute
from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_qwen3
from minigpt5 import MiniGPT5, new
from minigpt5.errors import TrainingError
from minigpt5.model.folder import load_decoder_model, load_generator_model, load_mapper, save, save_diffusion
from minigpt5.model.folder_config import load_config
from tests.helpers import pipelines
from tests.helpers.tiny import tiny_config, tiny_diffusion
from training.stages.model import find_decoder
from training.train import main
from training.weight_sources import WeightSources

QUICKLY_TRAINED = ("stable_diffusion_3",)
"""Families that are trained in every run of the tests; the others are marked as slow."""
MAKERS = [
    module.name
    for module in pkgutil.iter_modules(pipelines.__path__)
    if hasattr(importlib.import_module(f"{pipelines.__name__}.{module.name}"), "make")
]
STEPS = [
    "--workers",
    "0",
    "steps=10",
    "batch_size=2",
    "num_threads=1",
    "warmup_steps=1",
    "validation_batches=0",
    "log_every=5",
]


def make_base(family: str, folder: Path) -> None:
    """The first variant of a family."""
    maker = importlib.import_module(f"{pipelines.__name__}.{family}")
    maker.make(folder, **next(iter(maker.VARIANTS.values())))


@pytest.mark.parametrize(
    "family", [name if name in QUICKLY_TRAINED else pytest.param(name, marks=pytest.mark.slow) for name in MAKERS]
)
def test_a_family_is_aligned_and_draws_a_story(family: str, tmp_path: Path) -> None:
    make_qwen3(tmp_path / "qwen3")
    make_base(family, tmp_path / "diffusion")
    bases = ["--language", str(tmp_path / "qwen3"), "--diffusion", str(tmp_path / "diffusion")]
    assert new.main([*bases, "--context", "1024", "--out", str(tmp_path / "made")], show=lambda text: None) == 0

    write_part(
        Part(number=0, file="", start=0, count=8),
        layout="storybook:caption",
        uri="",
        output=str(tmp_path / "rows"),
        seed=3,
    )
    encode = precompute.Encode(
        model=str(tmp_path / "made"),
        source=str(tmp_path / "rows"),
        output=str(tmp_path / "encoded"),
        keeps_pictures=False,
        num_threads=1,
    )
    (rows,) = (tmp_path / "rows" / "rows").iterdir()
    assert encode({"file": str(rows)})["files"] == 1

    align = ["align", "--data", str(tmp_path / "encoded"), "--start", str(tmp_path / "made")]
    assert main([*align, "--out", str(tmp_path / "align"), *STEPS]) == 0
    losses = [json.loads(line) for line in (tmp_path / "align" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["picture"]) for line in losses if "picture" in line)
    before, after = (load_file(tmp_path / name / "mapper.safetensors") for name in ("made", "align/model"))
    assert {name for name in after if not after[name].equal(before[name])} == set(after), "all of the mapper moves"

    story = MiniGPT5.from_pretrained(tmp_path / "align" / "model").write("Fields.", pages=2, seed=7)
    assert len(story.pages) == 2
    for page in story.pages:
        assert page.picture is not None
        picture = Image.open(io.BytesIO(page.picture.png))
        assert picture.size == (page.picture.width, page.picture.height) and np.asarray(picture).std() > 0


@pytest.mark.parametrize(
    ("family", "positions"), [("flux", 24), ("stable_diffusion_3", 77 + 16), ("stable_diffusion_xl", 20)]
)
def test_a_shorter_condition_is_aligned_and_drawn(family: str, positions: int, tmp_path: Path) -> None:
    make_qwen3(tmp_path / "qwen3")
    make_base(family, tmp_path / "diffusion")
    bases = ["--language", str(tmp_path / "qwen3"), "--diffusion", str(tmp_path / "diffusion"), "--context", "512"]
    made = tmp_path / "made"
    assert new.main([*bases, "--condition", str(positions), "--out", str(made)], show=lambda text: None) == 0
    config = load_config(made)
    assert config.condition_length == positions and config.condition_positions == positions + 1
    assert load_mapper(made, config).null_condition().shape[1] == positions + 1

    part = Part(number=0, file="", start=0, count=8)
    write_part(part, layout="storybook:caption", uri="", output=str(tmp_path / "rows"), seed=3)
    align = ["align", "--data", str(tmp_path / "rows"), "--start", str(made), "--out", str(tmp_path / "align")]
    assert main([*align, *STEPS, "steps=1", "draws_samples=false"]) == 0
    model = MiniGPT5.from_pretrained(tmp_path / "align" / "model")
    assert model.draw(model.vokens("A field"), seed=1, settings=model.config.draw_settings({"steps": 1})).png


def test_a_decoder_of_the_same_family_is_taken_along_whole_and_another_is_refused(tmp_path: Path) -> None:
    for family in ("stable_diffusion_xl", "flux"):
        make_base(family, tmp_path / family)
    make_qwen3(tmp_path / "qwen3")
    bases = ["--language", str(tmp_path / "qwen3"), "--diffusion", str(tmp_path / "stable_diffusion_xl")]
    assert new.main([*bases, "--context", "512", "--out", str(tmp_path / "made")], show=lambda text: None) == 0
    config = load_config(tmp_path / "made")
    start = tmp_path / "made"

    with pytest.raises(TrainingError, match="is a Flux but .* was made for a StableDiffusionXL"):
        find_decoder(start, config, WeightSources(runs=tmp_path, start=start, decoder=tmp_path / "flux"))

    shutil.copytree(tmp_path / "stable_diffusion_xl" / "vae", tmp_path / "own" / "vae")
    sources = WeightSources(runs=tmp_path, start=start, decoder=tmp_path / "own")
    found = find_decoder(start, config, sources)
    assert found.is_own and found.parts["vae"] == tmp_path / "own"
    _, _, language, vision = load_generator_model(start)
    saved = save(
        tmp_path / "saved",
        config,
        language=language,
        mapper=load_mapper(start, config),
        vision=vision,
        start=start,
        decoder=found.parts,
    )
    assert type(load_decoder_model(tmp_path / "saved")[2]).__name__ == "StableDiffusionXL"
    assert saved.diffusion == "decoder"


def test_the_picture_world_s_first_model_has_its_decoder_from_the_stages_before(tmp_path: Path) -> None:
    """Its start folder has none yet."""
    config = tiny_config()
    save_diffusion(tiny_diffusion(config), tmp_path / "unet" / "model")
    found = find_decoder(tmp_path / "start" / "model", config, WeightSources(runs=tmp_path))
    assert found.is_own and set(found.parts.values()) == {tmp_path / "unet" / "model"}
    with pytest.raises(TrainingError, match="no vae to start from"):
        find_decoder(tmp_path / "start" / "model", config, WeightSources(runs=tmp_path / "none"))


def test_a_decoder_folder_without_parts_is_refused_and_a_model_folder_s_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "model" / "decoder" / "unet").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"none of vae, unet.*did you mean .*model/decoder"):
        WeightSources(runs=tmp_path, decoder=tmp_path / "model")
    assert WeightSources(runs=tmp_path, decoder=tmp_path / "model" / "decoder").decoder
