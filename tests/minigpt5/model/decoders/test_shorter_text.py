"""Conditions shorter than a pipeline's default: T5 reads fewer tokens, as `max_sequence_length` of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from minigpt5.model.decoders.diffusion import join_pooled
from minigpt5.model.decoders.load import find_family
from tests.helpers.pipelines import flux, stable_diffusion_3

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
def test_a_condition_without_room_for_t5_has_the_states_of_clip(tmp_path: Path) -> None:
    stable_diffusion_3.make(tmp_path)
    family = find_family(tmp_path)
    long, short = (family.load_text_encoder(tmp_path, num_positions=length)([CAPTION]) for length in (90, 77))
    torch.testing.assert_close(short[:, :-1], long[:, :77])
    torch.testing.assert_close(short[:, -1], long[:, -1])
