"""Presets of rivals: what they are, what their examples look like, and that each trains on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.errors import TrainingError
from minigpt5.evaluation.systems import marks
from minigpt5.evaluation.systems.load import RIVALS as SYSTEMS
from minigpt5.evaluation.systems.load import read_kind
from minigpt5.model.folder import PREFIX, load_language
from minigpt5.model.folder_config import check_folder, load_config
from minigpt5.model.language import load_tokenizer
from minigpt5.model.locate import find_part
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.weights import load_tensors
from minigpt5.objective.example import Example
from training import presets
from training.data.tokeniser import Tokeniser
from training.data.written import write_out
from training.presets import VokenPreset, load_presets
from training.storybook.examples import StorybookExamples
from training.storybook.rivals import LEARN, RIVALS, STAGE_2_EXAMPLES, make_start
from training.train import main

QUICK = ["steps=2", "batch_size=2", "num_threads=1", "warmup_steps=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with the published template, from bases of the real classes."""
    folder = tmp_path_factory.mktemp("rivals")
    places = [word for name, place in make_bases(folder / "bases").items() for word in (f"--{name}", str(place))]
    made = folder / "model"
    assert new.main([*places, "--template", "published", "--context", "2048", "--out", str(made)]) == 0
    return made


def test_every_rival_is_a_preset_with_a_system() -> None:
    assert set(RIVALS) == set(presets.RIVALS)
    for name, rival in RIVALS.items():
        assert load_presets(name) == rival.stages
        assert all(preset.stage == stage for stage, preset in rival.stages.items())
        assert not rival.system or rival.system in SYSTEMS
    assert set(SYSTEMS) == {rival.system for rival in RIVALS.values() if rival.system}


def test_ablations_differ_from_ours_in_what_they_are_named_for() -> None:
    def stage(name: str, stage: str) -> VokenPreset:
        preset = RIVALS[name].stages[stage]
        assert isinstance(preset, VokenPreset)
        return preset

    assert {stage("no-caption-loss", name).caption_weight for name in ("align", "learn")} == {0.0}
    assert {stage("no-diffusion-loss", name).picture_weight for name in ("align", "learn")} == {0.0}
    assert {stage("no-guidance-dropout", name).guidance_dropout for name in ("align", "learn")} == {0.0}
    assert stage("frozen", "learn").optimizer.learning_rate == 0.0
    assert stage("data-10", "learn").num_examples == STAGE_2_EXAMPLES // 10
    assert list(RIVALS["no-stage-1"].stages) == ["learn"]


def test_a_set_of_examples_begins_again() -> None:
    source = StorybookExamples(LEARN)
    first, again = source.example_at(3), source.example_at(3 + STAGE_2_EXAMPLES)
    assert first[0] == again[0] == 3
    assert first[1].segments == again[1].segments


def test_dialogues_are_among_the_examples_of_learn() -> None:
    source = StorybookExamples(LEARN)
    examples = [source.example_at(position)[1] for position in range(60)]
    dialogues = [one for one in examples if "generate conversations" in one.segments[0].text]
    assert 5 < len(dialogues) < 30
    assert any(one.drawn for one in dialogues) and not all(one.drawn for one in dialogues)


def test_drawn_pictures_are_written_out() -> None:
    example = Example(
        segments=PUBLISHED.next_page(["Before."], "It slept.", "both", variant=0),
        read=[],
        drawn=[],
        captions=["a fox, at night"],
    )
    described = write_out(example, "description")
    assert described.segments[-1].text == " It slept. <Draw>a fox, at night</Draw> ###"
    assert described.segments[-1].is_target and not described.captions
    marked = write_out(example, "mark", reads_pictures=False)
    assert [segment.kind for segment in marked.segments] == ["text", "text"], "joined, and no picture is read"
    assert marked.segments[-1].text == f" It slept.{marks.MARK} ###"
    assert write_out(example, "vokens") is example


def test_stored_rows_are_written_out_before_they_are_tokenised(base: Path) -> None:
    example = Example(segments=PUBLISHED.caption("A fox."), read=[], drawn=[], captions=["a fox"], is_caption=True)
    found = Tokeniser(str(base), "description")(example)
    assert found.tokens is not None and not found.is_caption
    config = load_config(base)
    tokenizer = load_tokenizer(find_part(base, config, config.language_model), config)
    assert tokenizer.decode(found.tokens.ids) == "A fox. <Draw>a fox</Draw> ###"


def run(stage: str, name: str, start: Path, out: Path, *settings: str) -> Path:
    runs = str(out.parent / "runs")
    options = ["--preset", name, "--start", str(start), "--out", str(out), "--runs", runs, "--workers", "0"]
    assert main([stage, *options, *QUICK, *settings]) == 0
    return out / "model"


@pytest.mark.parametrize(
    "name", ["no-caption-loss", "no-transformer", "vokens-1", "full", "prefix", "divter", "text-only"]
)
def test_a_rival_learns(name: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "start"
    make_start(name, folder, base=base)
    if "align" in RIVALS[name].stages:
        folder = run("align", name, folder, tmp_path / "align", "replay.fill=8")
        assert list((tmp_path / "runs" / "states").glob("*.safetensors")), "for others that begin alike"
    config = check_folder(run("learn", name, folder, tmp_path / "learn", "whitens=false"))
    assert config.num_vokens == RIVALS[name].config.get("num_vokens", 8)


def test_a_language_model_that_was_trained_whole_is_a_base_of_its_own(base: Path, tmp_path: Path) -> None:
    make_start("full", tmp_path / "start", base=base)
    settings = ("whitens=false", "standardises=false", "learning_rate=0.01", "replay.steps=0")
    folder = run("learn", "full", tmp_path / "start", tmp_path / "learn", *settings)
    config = check_folder(folder)
    assert config.language_model == "language"
    before, after = (load_language(one, load_config(one)) for one in (tmp_path / "start", folder))
    weights, trained = before.body.state_dict(), after.body.state_dict()
    moved = [name for name, value in trained.items() if (value - weights[name]).abs().max() > 1e-3]
    assert set(weights) == set(trained) and len(moved) > len(trained) / 2
    assert len(load_tokenizer(find_part(folder, config, "language"), config)) > config.vocabulary


def test_a_prefix_is_trained_alone_and_goes_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_start("prefix", tmp_path / "start", base=base)
    settings = ("whitens=false", "standardises=false", "learning_rate=0.01", "replay.steps=0", "prefix_tokens=3")
    folder = run("learn", "prefix", tmp_path / "start", tmp_path / "learn", *settings)
    assert not (folder / "adapter").exists() and check_folder(folder).language_model != "language"
    first = load_tensors(folder / PREFIX)["states"]
    assert first.shape[3] == 3
    again = run("learn", "prefix", folder, tmp_path / "again", *settings)
    moved = (load_tensors(again / PREFIX)["states"].float() - first.float()).abs().max()
    assert 1e-3 < moved < 0.1, "it goes on from the folder's own"
    options = ["--preset", "prefix", "--start", str(folder), "--out", str(tmp_path / "other"), "--workers", "0", *QUICK]
    assert main(["learn", *options, *settings, "prefix_tokens=4"]) == 1
    assert "set prefix_tokens=3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["learn", *options, *settings, "prefix_tokens=0"])
    assert "prefix_tokens is 0 but must be 1 or more" in capsys.readouterr().err
    adapted = run("learn", "minigpt5", folder, tmp_path / "adapted", *settings)
    assert torch.equal(load_tensors(adapted / PREFIX)["states"], first) and (adapted / "adapter").is_dir()
    for preset in ("prefix", "minigpt5"):
        options[1], options[5] = preset, str(tmp_path / f"recomputed-{preset}")
        assert main(["learn", *options, *settings, "checkpoint_activations=true"]) == 1
        assert "set checkpoint_activations=false" in capsys.readouterr().err


def test_states_with_a_fresh_prefix_are_kept_for_nobody(base: Path, tmp_path: Path) -> None:
    make_start("prefix", tmp_path / "start", base=base)
    run("learn", "prefix", tmp_path / "start", tmp_path / "learn")
    assert not list((tmp_path / "runs").glob("states/*"))
    run("learn", "minigpt5", tmp_path / "start", tmp_path / "other")
    assert list((tmp_path / "runs").glob("states/*"))


def test_gill_becomes_a_system(base: Path, tmp_path: Path) -> None:
    make_start("gill", tmp_path / "start", base=base)
    folder = run("retrieve", "gill", tmp_path / "start", tmp_path / "retrieve", "num_pictures=6", "num_indexed=5")
    assert read_kind(str(folder)) == "gill"
    check_folder(folder / "model")


def test_states_that_change_are_not_read_once(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_start("minigpt5", tmp_path / "start", base=base)
    options = ["--preset", "minigpt5", "--start", str(tmp_path / "start"), "--out", str(tmp_path / "out")]
    assert main(["align", *options, "--workers", "0", *QUICK, "replay.fill=8", "voken_learning_rate=0.1"]) == 1
    assert "set replay.fill=0" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="name a new folder"):
        make_start("gill", tmp_path / "start", base=base)
