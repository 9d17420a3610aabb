"""Conditions shorter than a pipeline's default: the text is cut as `max_sequence_length` of the pipeline cuts it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from minigpt5.model.decoders.diffusion import join_pooled
from minigpt5.model.decoders.load import find_family
from tests.helpers.pipelines import ernie_image, flux, sana, stable_diffusion_3

CAPTION = "a red fox"


def encode_as_stable_diffusion_3(pipeline: Any, length: int) -> Tensor:
    states, _, pooled, _ = pipeline.encode_prompt(
        CAPTION, None, None, do_classifier_free_guidance=False, max_sequence_length=length - 77
    )
    return join_pooled(states, pooled)


def encode_as_flux(pipeline: Any, length: int) -> Tensor:
    states, pooled, _ = pipeline.encode_prompt(CAPTION, max_sequence_length=length)
    return join_pooled(states, pooled)


@pytest.mark.parametrize(
    ("maker", "encode", "length"),
    [(stable_diffusion_3, encode_as_stable_diffusion_3, 77 + 16), (flux, encode_as_flux, 24)],
    ids=["stable_diffusion_3", "flux"],
)
@torch.no_grad()
def test_a_shorter_condition_is_the_pipelines(maker: Any, encode: Any, length: int, tmp_path: Path) -> None:
    maker.make(tmp_path, **next(iter(maker.VARIANTS.values())))
    encoder = find_family(tmp_path).load_text_encoder(tmp_path, num_positions=length)
    found = encoder([CAPTION, ""])
    assert found.shape[:2] == (2, length + 1)
    torch.testing.assert_close(found[:1], encode(DiffusionPipeline.from_pretrained(tmp_path), length))
    assert not found[0].equal(found[1])


@torch.no_grad()
def test_a_shorter_condition_of_sana_is_the_pipelines_with_zeros_for_padding(tmp_path: Path) -> None:
    sana.make(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    states, mask, no_states, no_mask = pipeline.encode_prompt(
        CAPTION, max_sequence_length=16, complex_human_instruction=instruction
    )
    found = find_family(tmp_path).load_text_encoder(tmp_path, num_positions=16)([CAPTION, ""])
    for one, theirs, is_text in ((found[0], states[0], mask[0].bool()), (found[1], no_states[0], no_mask[0].bool())):
        torch.testing.assert_close(one[is_text], theirs[is_text])
        assert is_text.any() and not is_text.all() and not one[~is_text].any()


@torch.no_grad()
def test_a_shorter_condition_of_ernie_image_is_the_beginning_of_the_pipelines(tmp_path: Path) -> None:
    """The prompt is shorter than the default, so zeros follow it; a cut one has the states of its first tokens."""
    ernie_image.make(tmp_path)
    (states,) = DiffusionPipeline.from_pretrained(tmp_path).encode_prompt(CAPTION, torch.device("cpu"))
    family = find_family(tmp_path)
    (cut,) = family.load_text_encoder(tmp_path, num_positions=4)([CAPTION])
    (padded,) = family.load_text_encoder(tmp_path, num_positions=32)([CAPTION])
    torch.testing.assert_close(cut, states[:4])
    torch.testing.assert_close(padded[: len(states)], states)
    assert len(states) < 32 and not padded[len(states) :].any()


@torch.no_grad()
def test_a_condition_without_room_for_t5_has_the_states_of_clip(tmp_path: Path) -> None:
    stable_diffusion_3.make(tmp_path)
    family = find_family(tmp_path)
    long, short = (family.load_text_encoder(tmp_path, num_positions=length)([CAPTION]) for length in (90, 77))
    torch.testing.assert_close(short[:, :-1], long[:, :77])
    torch.testing.assert_close(short[:, -1], long[:, -1])
