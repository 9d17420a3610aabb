"""A folder with a chat template is trained, saved, loaded and served, in this process."""

from __future__ import annotations

from pathlib import Path

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import MiniGPT5, new
from minigpt5.model import folder as model_folder
from minigpt5.model.chat_template import ChatTemplate
from minigpt5.model.folder_config import check_folder
from minigpt5.types import DrawSettings
from training import presets
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
