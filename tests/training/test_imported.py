"""A published checkpoint comes in, is trained in both stages, writes, and goes out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from batch_jobs import precompute
from batch_jobs.prepare import Part, write_part
from minigpt5 import MiniGPT5
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import check_folder, load_config
from minigpt5.model.locate import check_bases
from minigpt5.objective.encoders import find_encoders
from minigpt5.published.checkpoint import export_checkpoint, import_checkpoint, read_state_dict
from minigpt5.types import DrawSettings
from tests.reference import told_sizes
from training.train import main

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
QUICK = ["steps=1", "batch_size=2", "warmup_steps=1", "validation_batches=0", "draws_samples=false"]
QUICK += ["--workers", "0"]


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    folder = tmp_path / "imported"
    world = REFERENCE / "world"
    import_checkpoint(
        folder,
        stage1=read_state_dict(REFERENCE / "stage1_checkpoint.safetensors"),
        vision=read_state_dict(REFERENCE / "vision.safetensors"),
        llm=str(world / "llm"),
        diffusion=str(world / "stable-diffusion"),
        like=told_sizes(json.loads((REFERENCE / "config.json").read_text())),
    )
    return folder


def test_a_trained_q_former_beside_the_vision_encoder_leaves_its_hash(imported: Path) -> None:
    config = load_config(imported)
    before = find_encoders(imported, config)
    assert before.vision and (imported / "vision" / "model.safetensors").is_file()
    vision = model_folder.load_vision(imported, config)
    vision.qformer.queries.data.add_(1)
    model_folder.save_module(vision.qformer, imported / model_folder.QFORMER)
    assert find_encoders(imported, config) == before


def test_an_imported_model_is_trained_saved_and_exported(imported: Path, tmp_path: Path) -> None:
    world = {path: path.read_bytes() for path in (REFERENCE / "world").rglob("*") if path.is_file()}
    for number, kind in enumerate(("caption", "story")):
        part = Part(number=number, file="", start=0, count=6)
        write_part(part, layout=f"storybook:{kind}", uri="", output=str(tmp_path / "rows"), seed=3)
    encode = precompute.Encode(
        model=str(imported),
        source=str(tmp_path / "rows"),
        output=str(tmp_path / "encoded"),
        keeps_pictures=False,
        num_threads=1,
    )
    for path in sorted((tmp_path / "rows" / "rows").iterdir()):
        encode({"file": str(path)})
    data = ["--data", str(tmp_path / "encoded")]
    align, learn = tmp_path / "align", tmp_path / "learn"
    assert main(["align", *data, "--start", str(imported), "--out", str(align), *QUICK]) == 0
    assert main(["learn", *data, "--start", str(align / "model"), "--out", str(learn), *QUICK]) == 0
    finished = learn / "model"

    own, kept = (load_file(folder / "vocabulary.safetensors") for folder in (imported, finished))
    assert all(torch.equal(own[part], kept[part]) for part in own)
    assert (finished / "vision" / "model.safetensors").is_file() and (finished / "adapter").is_dir()
    assert not (finished / "decoder").exists(), "the diffusion model is a base"
    check_bases(finished, check_folder(finished))
    story = MiniGPT5.from_pretrained(finished).write("A fox", pages=1, seed=1, draw=DrawSettings(steps=1))
    assert story.pages[0].picture

    stage1, stage2, vision = export_checkpoint(finished)
    expected = set(read_state_dict(REFERENCE / "vision.safetensors")) - {"Qformer.bert.embeddings.position_ids"}
    assert stage2 and set(vision) == expected
    assert set(stage1) == set(read_state_dict(REFERENCE / "stage1_checkpoint.safetensors"))
    assert {path: path.read_bytes() for path in (REFERENCE / "world").rglob("*") if path.is_file()} == world
