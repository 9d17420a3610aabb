"""A folder with a chat template is trained, saved, loaded and served, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases, make_stable_diffusion
from minigpt5 import MiniGPT5, new
from minigpt5.errors import TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.chat_template import ChatTemplate
from minigpt5.model.folder_config import check_folder
from minigpt5.types import DrawSettings
from tests.helpers.tiny_vision_language import make_vision_language
from training import presets
from training.stage import build_stage
from training.train import find_examples, main, picture_world
from training.weight_sources import WeightSources

QUICK = ["steps=2", "batch_size=2", "num_threads=1", "warmup_steps=1", "validation_batches=0", "checkpoint_every_s=0"]


def test_a_folder_with_a_chat_template_learns_and_writes(tmp_path: Path) -> None:
    """The sample that the run draws at its end is written with the same template."""
    places = [word for name, place in make_bases(tmp_path / "bases").items() for word in (f"--{name}", str(place))]
    made, learn, rows = (str(tmp_path / name) for name in ("made", "learn", "rows"))
    assert new.main([*places, "--template", "chat", "--out", made]) == 0
    write_part(Part(number=0, file="", start=0, count=12), layout="storybook:story", uri="", output=rows, seed=3)
    options = ["--data", rows, "--start", made, "--out", learn, "--workers", "0", "story_share=1.0"]
    assert main(["learn", *options, *QUICK]) == 0

    trained = Path(learn) / "model"
    assert check_folder(trained).template == "chat"
    assert isinstance(model_folder.load_template(trained), ChatTemplate)
    sources = WeightSources(runs=tmp_path / "runs", start=learn + "/model")
    preset = presets.override(presets.load_presets("published")["learn"], [*QUICK, "epochs=0", "story_share=1.0"])
    for data in (find_examples(preset, sources, rows)[1], picture_world(preset, sources)):
        segments = data.training.example_at(0)[1].segments
        assert segments[0].text.startswith("<|im_start|>user\n") and segments[-1].text == "<|im_end|>"
    assert "data:image/png" in (Path(learn) / "story.html").read_text()
    story = MiniGPT5.from_pretrained(trained).write("A fox", pages=2, seed=1, draw=DrawSettings(steps=1))
    assert [page.picture is not None for page in story.pages] == [True, True]


def test_all_weights_of_a_language_model_are_trained_saved_and_read_again(tmp_path: Path) -> None:
    """The start has an adapter, which goes into the weights; a step that bfloat16 cannot tell apart is not lost."""
    places = [word for name, place in make_bases(tmp_path / "bases").items() for word in (f"--{name}", str(place))]
    made, rows = str(tmp_path / "made"), str(tmp_path / "rows")
    assert new.main([*places, "--out", made]) == 0
    write_part(Part(number=0, file="", start=0, count=8), layout="storybook:story", uri="", output=rows, seed=3)
    quick = ["--data", rows, "--workers", "0", *QUICK, "draws_samples=false", "warmup_steps=0"]
    learn, tuned = tmp_path / "learn", tmp_path / "tuned"
    assert main(["learn", "--start", made, "--out", str(learn), *quick, "learning_rate=0.05"]) == 0
    assert (learn / "model" / "adapter").is_dir()

    options = ["--start", str(learn / "model"), "--out", str(tuned), *quick, "tunes=body", "ema_decay=0"]
    assert main(["learn", *options, "learning_rate=1e-4", "bf16=true"]) == 0
    found = tuned / "model"
    config = check_folder(found)
    assert config.language_model == "language" and not (found / "adapter").exists()
    before, after = (
        model_folder.load_language(folder, check_folder(folder)) for folder in (learn / "model", tuned / "model")
    )
    moved = {}
    for (name, old), new_value in zip(before.body.named_parameters(), after.body.parameters(), strict=True):
        if old.dim() > 1:  # float16, in which weights are stored, tells no small step from 1
            moved[name] = float((old - new_value).abs().max())
    assert moved and all(0 < step < 3e-3 for step in moved.values()), moved
    ids_1S = torch.arange(40)[None]
    logits = [one.logits(one.states(one.embed(ids_1S))) for one in (before, after)]
    assert 0 < float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) < 0.1, "near what it started from"
    assert MiniGPT5.from_pretrained(found).write("A fox", pages=1, seed=1, draw=DrawSettings(steps=1)).pages


def test_the_body_of_a_vision_language_model_is_not_trained_whole(tmp_path: Path) -> None:
    make_vision_language("qwen2_vl", tmp_path / "vl")
    make_stable_diffusion(tmp_path / "diffusion")
    bases = ["--language", str(tmp_path / "vl"), "--diffusion", str(tmp_path / "diffusion")]
    assert new.main([*bases, "--out", str(tmp_path / "made")]) == 0
    preset = presets.override(presets.load_presets("published")["learn"], [*QUICK, "epochs=0", "tunes=body"])
    sources = WeightSources(runs=tmp_path / "runs", start=tmp_path / "made")
    with pytest.raises(TrainingError, match="tunes is body, but the language model of .* set tunes=adapter"):
        build_stage(preset, sources, picture_world(preset, sources))
