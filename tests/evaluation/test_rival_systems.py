"""Rivals answer, on tiny models of the real classes: texts and pictures where they are asked for, nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.config import NO_VISION
from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.systems.divter import DivterSystem
from minigpt5.evaluation.systems.face import Question
from minigpt5.evaluation.systems.folder import MODEL, save_system, write_system
from minigpt5.evaluation.systems.gill import GillSystem
from minigpt5.evaluation.systems.load import load_system, read_system
from minigpt5.evaluation.systems.marks import END_MARK, MARK, describe
from minigpt5.evaluation.systems.retrieval import PictureIndex, Retrieval, save_retrieval
from minigpt5.evaluation.systems.stable_diffusion import StableDiffusionSystem
from minigpt5.evaluation.systems.text_to_picture import Caption, TextToPicture
from minigpt5.evaluation.systems.two_stage import TwoStageSystem
from minigpt5.evaluation.systems.writing import TextWriter
from minigpt5.model import folder as model_folder
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.folder_config import check_folder, load_config, write_config
from minigpt5.types import DrawSettings, InputImage, Role, Sampling
from tests.helpers.picture_files import encode
from tests.helpers.tiny import save_tiny, tiny_diffusion

DRAW = DrawSettings(steps=1, guidance_scale=2.0)
SAMPLING = Sampling(temperature=0.0, max_page_tokens=6)


PNG = encode(Image.new("RGB", (32, 32), (0, 128, 0)), "PNG")


def asked(wants: str, *context: object, **others: object) -> Question:
    return Question(context=context, wants=wants, draw=DRAW, sampling=SAMPLING, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    places = [word for name, place in make_bases(folder / "bases").items() for word in (f"--{name}", str(place))]
    options = ["--template", "published", "--context", "2048", "--out", str(folder / "model")]
    assert new.main([*places, *options]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def drawer(model: Path) -> TextToPicture:
    return TextToPicture.from_pretrained(model)


@pytest.fixture(scope="module")
def writer(model: Path) -> TextWriter:
    return TextWriter.from_pretrained(model)


class Written:
    """Stands for a trained writer: a tiny random one writes no marks."""

    def __init__(self, writer: TextWriter, *texts: str) -> None:
        self.generator, self.texts = writer.generator, list(texts)
        self.begun: list[str] = []

    def write(self, questions: list[Question], *, begun: str = "", stop: tuple[str, ...] = ()) -> list[str]:
        self.begun += [begun] * len(questions)
        return [self.texts.pop(0) for _ in questions]


def test_a_writers_prompt_is_ours_with_texts_joined(writer: TextWriter) -> None:
    question = asked("picture", "One.", InputImage(data=PNG), "Two.", is_page=True)
    segments = writer.template.scene(question.context[:-1], "Two.")
    prompt = writer._request(question, MARK, ()).prompt
    assert [type(part) for part in prompt] == [str, InputImage, str]
    assert "".join(part for part in prompt if isinstance(part, str)) == "".join(s.text for s in segments) + MARK


def test_a_writers_prompt_is_read_as_it_is(writer: TextWriter) -> None:
    """Its segments stand in a template already: a second one around them is what it was never trained on."""
    request = writer._request(asked("reply", Role(name="user"), "Hello."), "", ())
    (text,) = request.prompt
    assert writer.generator.prompter.encode(request).ids == writer.generator.tokenizer(str(text))["input_ids"]


def test_a_writer_writes_up_to_its_limit_and_never_draws(writer: TextWriter) -> None:
    questions = [asked("reply", Role(name="user"), "Hello."), asked("pages", "A fox", pages=2)]
    reply, pages = writer.write(questions)
    assert len(writer.generator.tokenizer(reply)["input_ids"]) <= 6
    assert len(writer.generator.tokenizer(pages)["input_ids"]) <= 12
    assert writer.write(questions[:1]) == [reply]


def test_a_picture_depends_on_its_caption_and_seed_alone(drawer: TextToPicture) -> None:
    captions = [Caption(text="a fox", seed=1, draw=DRAW), Caption(text="an owl", seed=1, draw=DRAW)]
    other = Caption(text="a fox", seed=1, draw=dataclasses.replace(DRAW, steps=2))
    fox, owl, slow = drawer.draw([*captions, other])
    assert np.abs(np.asarray(drawer.draw(captions[:1])[0], int) - np.asarray(fox, int)).max() <= 1
    assert (np.asarray(fox) != np.asarray(owl)).any() and (np.asarray(fox) != np.asarray(slow)).any()


def test_the_diffusion_model_alone_draws_the_last_text(drawer: TextToPicture) -> None:
    system = StableDiffusionSystem(drawer)
    (alone,), (after,) = system.answer([asked("picture", "a fox"), asked("picture", "An owl slept.", "a fox")])
    assert isinstance(alone, Image.Image) and np.abs(np.asarray(alone, int) - np.asarray(after, int)).max() <= 1
    with pytest.raises(InvalidRequest, match="answers picture but was asked for reply"):
        system.answer([asked("reply", "Hello.")])
    with pytest.raises(InvalidRequest, match="does not end with a text"):
        system.answer([asked("picture", InputImage(data=PNG))])


def test_two_stages_draw_what_stands_before_a_mark(writer: TextWriter, drawer: TextToPicture) -> None:
    texts = (f" It was dark.{MARK} It slept.{MARK} More.{MARK}", " Hello.")
    system = TwoStageSystem(Written(writer, *texts), drawer)  # type: ignore[arg-type]
    pages, reply = system.answer([asked("pages", "A fox", pages=2, seed=3), asked("reply", "Hi")])
    assert [part if isinstance(part, str) else "picture" for part in pages] == [
        "It was dark.",
        "picture",
        "It slept.",
        "picture",
    ]
    assert reply == ("Hello.",)
    expected = drawer.draw([Caption.of_page("It slept.", seed=3, page=2, draw=DRAW)])[0]
    assert np.abs(np.asarray(pages[3], int) - np.asarray(expected, int)).max() <= 1


def test_divter_draws_what_it_has_described(writer: TextWriter, drawer: TextToPicture) -> None:
    written = Written(writer, "a fox, at night", f" Look.{describe('an owl')}")
    system = DivterSystem(written, drawer)  # type: ignore[arg-type]
    reply, (picture,) = system.answer([asked("reply", "Show me"), asked("picture", "It slept.", is_page=True)])
    assert written.begun == [MARK, ""], "what a given text shows is asked for by the mark"
    fox = drawer.draw([Caption.of_page("a fox, at night", seed=0, page=1, draw=DRAW)])[0]
    assert np.abs(np.asarray(picture, int) - np.asarray(fox, int)).max() <= 1
    assert reply[0] == "Look." and isinstance(reply[1], Image.Image) and END_MARK not in str(reply[0])


def test_a_text_system_is_opened_by_its_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rival"
    save_system(folder, "text-only", model)
    info = read_system(str(folder))
    assert (info.name, info.kinds) == ("text-only", frozenset({"text", "reply"}))
    assert info.reads_pictures == (load_config(model).vision.family != "none")
    assert info.version == json.loads((model / "config.json").read_text())["fingerprint"]
    system = load_system(str(folder))
    (answer,) = system.answer([asked("reply", "Hello.")])
    assert all(isinstance(part, str) and MARK.strip() not in part for part in answer)
    with pytest.raises(InvalidRequest, match="was asked for pages"):
        system.answer([asked("pages", "A fox")])


def test_a_finetuned_denoiser_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    """The distilled one was made from the old one, and goes."""
    config = save_tiny(tmp_path / "model")
    model_folder.save_diffusion(tiny_diffusion(config, is_distilled=True), tmp_path / "model" / "decoder")
    write_config(tmp_path / "model", model_folder.draws_with(config, tiny_diffusion(config, is_distilled=True)))
    other = tiny_diffusion(config)
    other.denoiser.conv_out.bias.data.fill_(0.5)
    model_folder.save_diffusion(other, tmp_path / "tuned")
    save_system(tmp_path / "rival", "stable-diffusion", tmp_path / "model", decoder=tmp_path / "tuned")
    saved = check_folder(tmp_path / "rival" / MODEL)
    assert saved.draw_distilled is None and not (tmp_path / "rival" / MODEL / "decoder" / "unet_distilled").exists()
    denoiser = load_diffusion(tmp_path / "rival" / MODEL / "decoder").denoiser
    assert bool((denoiser.conv_out.bias == 0.5).all())


@pytest.mark.parametrize(
    ("system", "sees", "reads"), [("gill", True, True), ("two-stage", False, False), ("stable-diffusion", True, False)]
)
def test_who_reads_no_pictures_says_so(tmp_path: Path, system: str, sees: bool, reads: bool) -> None:
    save_tiny(tmp_path / "model")
    if not sees:
        write_config(tmp_path / "model", dataclasses.replace(load_config(tmp_path / "model"), vision=NO_VISION))
    save_system(tmp_path / "rival", system, tmp_path / "model")
    assert read_system(str(tmp_path / "rival")).reads_pictures == reads


def test_another_index_is_another_version(tmp_path: Path) -> None:
    config = save_tiny(tmp_path / "model")
    versions = []
    for place in range(2):
        (tmp_path / f"{place}").mkdir()
        shutil.copytree(tmp_path / "model", tmp_path / f"{place}" / MODEL)
        index = PictureIndex(np.full((1, 16, 16, 3), place, np.uint8), torch.eye(256)[:1])
        save_retrieval(tmp_path / f"{place}", Retrieval(config.num_vokens, config.hidden), index)
        write_system(tmp_path / f"{place}", "gill", draw=config.draw)
        versions.append(read_system(str(tmp_path / f"{place}")).version)
    assert len({*versions, config.fingerprint}) == 3


def test_gill_shows_a_picture_of_its_index_where_it_decides_so(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    save_system(tmp_path / "gill", "gill", model)
    retrieval = Retrieval(config["num_vokens"], config["hidden"])
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    for bias, is_retrieved in ((100.0, True), (-100.0, False)):
        with torch.no_grad():
            retrieval.decide.bias.fill_(bias)
        save_retrieval(tmp_path / "gill", retrieval, PictureIndex(red, torch.eye(256)[:1]))
        system = load_system(str(tmp_path / "gill"))
        assert isinstance(system, GillSystem)
        (picture,) = system.answer([asked("picture", "a fox")])[0]
        assert isinstance(picture, Image.Image) and picture.size == (config["image_px"],) * 2
        assert bool((np.asarray(picture) == (255, 0, 0)).all()) == is_retrieved
    assert (tmp_path / "gill" / MODEL / "config.json").is_file()
