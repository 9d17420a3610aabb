"""Vision-language models of the real classes at tiny size: what is read and written equals their own library's."""

from __future__ import annotations

import functools
import io
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from examples.own_model.tiny_bases import make_stable_diffusion
from minigpt5 import new
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import check_folder
from minigpt5.model.image_transforms import fit_read
from minigpt5.model.language import load_base, load_tokenizer
from minigpt5.model.locate import find_part
from minigpt5.model.positions import grid_positions
from minigpt5.model.prompt import (
    DRAW_TARGET,
    encode,
    given_ids,
    pictures_read,
    request_segments,
    text_segment,
)
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.model.vision_language import FAMILIES, OwnEncoder
from minigpt5.objective.example import Example
from minigpt5.objective.objective import Objective
from minigpt5.types import GeneratorEvent, InputImage, Page, Picture, Sampling, StoryRequest, TextDelta, Vokens
from tests.helpers.streams import run_together
from tests.helpers.tiny_vision_language import IMAGE_PX, MAKERS, QWEN_CHAT, make_vision_language
from tests.training import test_vision_language_run

CONTEXT = 768
TOLERANCE = 1e-5
"""Of the largest value."""
NUM_TOKENS = 24
GREEDY = Sampling(temperature=0, max_page_tokens=NUM_TOKENS)
PROCESSORS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "idefics3": Idefics3Processor,
    "smolvlm": SmolVLMProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "gemma3": Gemma3Processor,
}
families = pytest.mark.parametrize("made", sorted(MAKERS), indirect=True)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model folder of a tiny vision-language model, and transformers' own model beside it."""

    base: Path
    folder: Path
    generator: VokenGenerator
    own: Any
    own_encoder: OwnEncoder

    def inputs(self, request: StoryRequest) -> dict[str, Tensor]:
        """What transformers' own model takes for what a request reads, and for the text that it gives."""
        given = given_ids(request, self.generator.template, self.generator.tokenizer)
        ids = [*self.ids(request), *itertools.chain.from_iterable(given)]
        pictures = [fit_read(data, self.own_encoder.image_px) for data in pictures_read(request)]
        if not pictures:
            return {"input_ids": torch.tensor([ids])}
        placeholder = self.generator.language.voken_embeddings.placeholder
        return self.own_encoder.own_inputs(torch.tensor([ids]), pictures, placeholder=placeholder)

    def ids(self, request: StoryRequest) -> list[int]:
        return encode(
            request_segments(request, self.generator.template),
            self.generator.tokenizer,
            self.generator.language.voken_embeddings,
            picture_tokens=self.generator.config.vision.picture_tokens,
        ).ids

    @property
    def image_id(self) -> int:
        return self.own.config.image_token_id

    @torch.no_grad()
    def own_state(self, request: StoryRequest) -> np.ndarray:
        """The state of the last token: (H,)."""
        return self.own.base_model(**self.inputs(request)).last_hidden_state[0, -1].numpy()


@functools.cache
def make(kind: str, root: Path) -> Made:
    base, diffusion, folder = root / "base", root / "stable-diffusion", root / "made"
    make_vision_language(kind, base)
    make_stable_diffusion(diffusion)
    options = ["--language", str(base), "--diffusion", str(diffusion), "--image-px", str(IMAGE_PX[kind])]
    assert new.main([*options, "--context", str(CONTEXT), "--out", str(folder)], show=lambda text: None) == 0
    own = load_base(base)
    encoder = OwnEncoder(own, base, image_px=IMAGE_PX[kind])
    return Made(
        base=base,
        folder=folder,
        generator=VokenGenerator.from_pretrained(folder),
        own=own,
        own_encoder=encoder,
    )


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def made(request: pytest.FixtureRequest, root: Path) -> Made:
    return make(request.param, root / request.param)


@functools.cache
def picture(seed: int, *, width: int = 60, height: int = 48) -> InputImage:
    """A PNG file of large random blocks, larger than what any tiny model reads."""
    blocks = np.random.default_rng(seed).integers(256, size=(4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return InputImage(data=file.getvalue())


def chat(*parts: str | InputImage, **changes: object) -> StoryRequest:
    values: dict[str, Any] = {"mode": "reply", "pictures": "none", "pages": 1, "seed": 1, "sampling": GREEDY}
    return StoryRequest(prompt=parts, **{**values, **changes})


def story(*parts: str | InputImage, **changes: object) -> StoryRequest:
    """Of one page with a text that is given."""
    return StoryRequest(prompt=parts, **{"pages": 1, "seed": 1, "given": ("It is so.",), **changes})  # type: ignore[arg-type]


def run(generator: VokenGenerator, *requests: StoryRequest) -> list[list[GeneratorEvent]]:
    return run_together(generator.generate, requests)


def text(events: list[GeneratorEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def vokens(events: list[GeneratorEvent]) -> np.ndarray:
    """States of the first picture: (V, H)."""
    return next(event.hidden_VH for event in events if isinstance(event, Vokens))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def make_objective(folder: Path) -> Objective:
    config, mapper, diffusion = model_folder.load_decoder_model(folder)
    language, vision = model_folder.load_language_and_vision(folder, config)
    base = find_part(folder, config, config.language_model)
    text_encoder = load_text_encoder(find_part(folder, config, config.text_encoder), config)
    tokenizer = load_tokenizer(base, config)
    return Objective(config, tokenizer, language, vision, mapper, diffusion, text_encoder).eval()


TELLS = ("What is this?", picture(1), "And this?", picture(2), "Say it.")


@families
def test_text_with_pictures_in_the_prompt_is_what_its_own_library_generates(made: Made) -> None:
    request = chat(*TELLS)
    inputs = made.inputs(request)
    rows = made.own.get_input_embeddings().weight.shape[0]
    padding = list(range(made.generator.config.vocabulary, rows)) or None
    ids_1S = made.own.generate(
        **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, suppress_tokens=padding
    )
    written = [int(token) for token in ids_1S[0, inputs["input_ids"].shape[1] :]]
    expected = made.generator.tokenizer.decode([token for token in written if token not in made.generator.end_ids])
    found = text(run(made.generator, request)[0])
    assert found.strip() == expected.strip() and len(set(written)) > 3
    others = chat(TELLS[0], picture(3), *TELLS[2:])
    assert text(run(made.generator, others)[0]) != found, "the pictures decide what is written"


@families
def test_states_after_pictures_are_those_of_its_own_library(made: Made) -> None:
    request = story(*TELLS)
    assert_close(vokens(run(made.generator, request)[0])[0], made.own_state(request))


@families
def test_a_batch_writes_what_each_writes_alone(made: Made) -> None:
    """The prompts are longer than what is read at once, and are read in parts beside those who write."""
    told = "of a fox and a very long way through the snow, " * 2
    requests = [chat("Hello?"), *(chat(told[: 30 * n], picture(n), "Who?", picture(n + 1)) for n in range(1, 4))]
    requests += [story(told, picture(4), given=("So.",)), story("Fields.", given=("They are green.",))]
    alone = [run(VokenGenerator.from_pretrained(made.folder), request)[0] for request in requests]
    together = run(VokenGenerator.from_pretrained(made.folder), *requests)
    for found, expected in zip(together, alone, strict=True):
        assert text(found) == text(expected)
    for found, expected in zip(together[-2:], alone[-2:], strict=True):
        assert_close(vokens(found), vokens(expected))


@families
def test_a_prompt_that_begins_as_another_is_read_from_there(made: Made) -> None:
    generator = VokenGenerator.from_pretrained(made.folder)
    run(generator, chat(*TELLS))
    before = generator.num_reused_tokens
    longer = story("What is this?", picture(1), "And this?", picture(2), "Say more.")
    same = chat("What is this?", picture(1), "And this?", picture(3), "Say it.")
    found = run(generator, same, longer)
    assert generator.num_reused_tokens - before > generator.config.vision.num_picture_tokens
    assert text(found[0]) == text(run(VokenGenerator.from_pretrained(made.folder), same)[0])
    assert_close(vokens(found[1])[0], made.own_state(longer))


@families
def test_pictures_of_earlier_pages_are_read_back(made: Made) -> None:
    drawn = [
        Page(
            index=number,
            text=f"Page {number}.",
            picture=Picture(page=number, png=picture(number).data, width=60, height=48, seed=1, denoise_steps=1),
        )
        for number in (1, 2)
    ]
    request = story("A fox", picture(7), previous=tuple(drawn), feedback="pictures")
    assert len(pictures_read(request)) == 3
    assert_close(vokens(run(made.generator, request)[0])[0], made.own_state(request))


@families
def test_training_reads_a_padded_batch_as_serving_reads_each(made: Made) -> None:
    requests = [story(*TELLS), story("Fields.", picture(3))]
    objective = make_objective(made.folder)
    px, template = made.own_encoder.image_px, made.generator.template
    said = template.page("It is so.", begins_answer=True)
    examples = [
        Example(
            segments=[*request_segments(request, template), text_segment(said), DRAW_TARGET],
            read=[fit_read(data, px) for data in pictures_read(request)],
            drawn=[],
            captions=[],
        )
        for request in requests
    ]
    with torch.no_grad():
        vokens_PVH, _ = objective.read(examples)
        stored = [
            replace(example, read=list(objective.vision.encode(example.read).half().numpy())) for example in examples
        ]
        from_stored_PVH, _ = objective.read(stored)
    for found, request in zip(vokens_PVH, requests, strict=True):
        assert_close(found.numpy(), vokens(run(made.generator, request)[0]))
    assert (from_stored_PVH - vokens_PVH).abs().max() < 0.02 * vokens_PVH.abs().max(), "stored in float16"


@families
def test_the_folder_names_the_base_and_holds_nothing_of_it(made: Made) -> None:
    config = check_folder(made.folder)
    assert config.vision.encoder == config.language_model == str(made.base)
    names = {path.name for path in made.folder.iterdir()}
    assert names == {"config.json", "vokens.safetensors", "mapper.safetensors"}


@families
def test_language_model_and_vision_are_the_halves_of_one_model(made: Made) -> None:
    language, vision = model_folder.load_language_and_vision(made.folder, made.generator.config)
    halves = [*language.body.parameters(), *language.head.parameters(), *vision.parameters()]
    num_values = sum(one.numel() for one in {id(one): one for one in halves}.values())
    assert num_values == sum(one.numel() for one in made.own.parameters())
    assert not list(vision.qformer.parameters())


@families
def test_pictures_are_read_beside_a_language_model_in_bfloat16(made: Made) -> None:
    generator = VokenGenerator.from_pretrained(made.folder, precision="bfloat16")
    assert next(generator.vision.parameters()).dtype == torch.float32
    found, expected = (vokens(run(one, story(*TELLS))[0]) for one in (generator, made.generator))
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_the_docs_list_every_family_with_its_tests() -> None:
    assert set(MAKERS) == set(FAMILIES)
    lines = Path("docs/own-models.md").read_text().partition("| type | models |")[2].splitlines()
    columns = [cell.strip() for cell in lines[0].strip(" |").split("|")]
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in lines[2 : 2 + len(FAMILIES)]]
    assert {row[0].strip("`") for row in rows} == set(FAMILIES)
    assert all(row[3:] == ["yes"] * (len(columns) - 1) for row in rows)
    tests = {name for name, test in globals().items() if families.mark in getattr(test, "pytestmark", [])}
    assert columns[1:] == list(TESTS) and tests | {RUN} == set(TESTS.values())
    assert any(mark.args[0] == "made" for mark in getattr(test_vision_language_run, RUN).pytestmark)


RUN = "test_both_stages_train_it_and_it_writes_reads_and_draws"
TESTS = {
    "text": "test_text_with_pictures_in_the_prompt_is_what_its_own_library_generates",
    "states": "test_states_after_pictures_are_those_of_its_own_library",
    "tokens": "test_a_picture_is_the_text_that_its_own_processor_writes",
    "batch": "test_a_batch_writes_what_each_writes_alone",
    "prefix": "test_a_prompt_that_begins_as_another_is_read_from_there",
    "read back": "test_pictures_of_earlier_pages_are_read_back",
    "padding": "test_training_reads_a_padded_batch_as_serving_reads_each",
    "bfloat16": "test_pictures_are_read_beside_a_language_model_in_bfloat16",
    "halves": "test_language_model_and_vision_are_the_halves_of_one_model",
    "folder": "test_the_folder_names_the_base_and_holds_nothing_of_it",
    "train, serve": RUN,
}
"""Column of the table in docs/own-models.md -> the test of each family."""


def test_small_pictures_are_enlarged_as_its_own_processor_scales(root: Path) -> None:
    made = make("qwen2_5_vl", root / "qwen2_5_vl")
    small = fit_read(picture(1, width=9, height=12).data, IMAGE_PX["qwen2_5_vl"])
    assert small.shape == (9, 9, 3)
    side = (IMAGE_PX["qwen2_5_vl"],) * 2
    enlarged = np.asarray(Image.fromarray(small).resize(side, Image.Resampling.BICUBIC))
    vision = made.generator.vision
    assert torch.equal(vision([small]), vision([enlarged]))


@pytest.mark.parametrize(
    ("kind", "px", "words"),
    [("qwen2_5_vl", "22", "a multiple of 4 pixels"), ("gemma3", "32", "reads pictures of 16 pixels")],
)
def test_a_size_that_a_family_does_not_read_is_refused(
    kind: str, px: str, words: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, diffusion = make(kind, root / kind).base, root / kind / "stable-diffusion"
    options = ["--language", str(base), "--diffusion", str(diffusion), "--out", str(tmp_path / "out")]
    assert new.main([*options, "--image-px", px]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_without_its_tower_it_writes_as_its_own_library(root: Path, tmp_path: Path) -> None:
    made = make("qwen2_5_vl", root / "qwen2_5_vl")
    options = ["--language", str(made.base), "--diffusion", str(root / "qwen2_5_vl" / "stable-diffusion")]
    options += ["--vision", "none", "--context", str(CONTEXT), "--out", str(tmp_path / "out")]
    assert new.main(options, show=lambda text: None) == 0
    generator = VokenGenerator.from_pretrained(tmp_path / "out")
    assert not list(generator.vision.parameters())
    request = story("A fox")
    assert_close(vokens(run(generator, request)[0])[0], made.own_state(request))


@families
def test_a_picture_is_the_text_that_its_own_processor_writes(made: Made) -> None:
    tokenizer, vision = made.generator.tokenizer, made.generator.config.vision
    ids = itertools.chain.from_iterable([made.image_id] * -one if one < 0 else [one] for one in vision.picture)
    assert tokenizer.decode(list(ids)) == processor_text(made)


@pytest.mark.parametrize("made", ["qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"], indirect=True)
def test_a_chat_with_pictures_is_what_its_own_template_and_processor_write(made: Made) -> None:
    tokenizer = made.generator.tokenizer
    asked = [{"type": "text", "text": "This: "}, {"type": "image"}, {"type": "text", "text": " And this: "}]
    asked += [{"type": "image"}, {"type": "text", "text": " Tell."}]
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    ours = made.ids(chat("This:", picture(1), "And this:", picture(2), "Tell."))
    image_token = tokenizer.convert_ids_to_tokens(made.image_id)
    alone = f"<|vision_start|>{image_token}<|vision_end|>" if image_token in QWEN_CHAT else image_token
    expected = tokenizer.encode(said.replace(alone, processor_text(made)), add_special_tokens=False)
    placeholder = made.generator.language.voken_embeddings.placeholder
    assert [made.image_id if token == placeholder else token for token in ours] == expected


def processor_text(made: Made) -> str:
    """What the processor of the family writes for a picture, without its video half, which needs torchvision."""
    kind, encoder = made.own.config.model_type, made.own_encoder
    image_token = made.generator.tokenizer.convert_ids_to_tokens(made.image_id)
    pictures = [np.zeros((encoder.image_px, encoder.image_px, 3), np.uint8)] * 2
    options = encoder.family.options(encoder.image_px)
    own: dict[str, Any] = {"image_token": image_token, "image_processor": encoder.processor}
    if kind in ("idefics3", "smolvlm"):
        options["return_row_col_info"] = True
        own |= {"fake_image_token": "<fake_token_around_image>", "image_seq_len": 4}
        own |= {"global_image_tag": "<global-img>", "global_image_token": "<global-img>"}
    if kind == "llava_onevision":
        own |= {"num_image_tokens": 9, "vision_feature_select_strategy": "full"}
    if kind == "gemma3":
        return Gemma3Processor(encoder.processor, made.generator.tokenizer, image_seq_length=16).full_image_sequence
    replace_image_token = PROCESSORS[kind].replace_image_token
    read = encoder.processor(images=[pictures], return_tensors="pt", **options)
    text = replace_image_token(SimpleNamespace(**own), read, 0)
    return f"<|vision_start|>{text}<|vision_end|>" if kind.startswith("qwen") else text  # as its chat template has it


def test_positions_of_pictures_are_those_of_transformers() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(text_config={"num_hidden_layers": 0}, vision_config={"depth": 0})
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    is_picture_BS = torch.zeros(2, 30, dtype=torch.bool)
    for row, start in ((0, 2), (0, 15), (1, 0), (1, 21)):
        is_picture_BS[row, start : start + 9] = True
    expected, _ = model.get_rope_index(
        is_picture_BS.long(), is_picture_BS.int(), image_grid_thw=torch.tensor([[1, 6, 6]] * 4)
    )
    assert torch.equal(grid_positions(is_picture_BS, 3), expected)
