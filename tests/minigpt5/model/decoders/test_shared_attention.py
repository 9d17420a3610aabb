"""A picture attends to another one: nothing changes where there is nothing to attend to, nor for pictures beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from minigpt5.engine.decoder import DiffusionDecoder, content_key
from minigpt5.engine.denoising import Denoising
from minigpt5.errors import FingerprintMismatch, InvalidRequest
from minigpt5.model.decoders.shared_attention import shared_attention
from minigpt5.types import DrawRequest, DrawSettings, Reference
from tests.helpers.pipelines import flux
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from tests.minigpt5.engine.test_decoder import FAST, new_decoder, pixels, run, vokens


@pytest.fixture(scope="module")
def decoder() -> DiffusionDecoder:
    return new_decoder()


def request(page: int, *, seed: int = 9, reference: Reference | None = None) -> DrawRequest:
    return DrawRequest(vokens=vokens(page), seed=seed, settings=FAST, reference=reference)


FIRST = Reference(vokens=vokens(1), seed=7)


def test_without_a_share_of_the_reference_a_call_is_what_it_is_alone() -> None:
    unet = tiny_diffusion(tiny_config()).denoiser
    torch.manual_seed(0)
    latents, states = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 16)

    @torch.no_grad()
    def predict(share: float | None) -> torch.Tensor:
        with shared_attention(unet, {} if share is None else {0: 2, 1: 2}, share=share or 0.0):
            return unet(latents, torch.full((3,), 300), encoder_hidden_states=states).sample

    plain = predict(None)
    assert torch.equal(predict(0.0), plain)
    half, whole = predict(0.5), predict(1.0)
    assert torch.equal(half[2], plain[2]) and torch.equal(whole[2], plain[2]), "the reference is as it is alone"
    for one, other in ((half, plain), (whole, plain), (whole, half)):
        assert (one[:2] - other[:2]).abs().max() > 1e-4
    assert torch.equal(predict(None), plain), "nothing is left of it"


def test_stories_with_and_without_a_reference_share_a_batch(decoder: DiffusionDecoder) -> None:
    """Each picture is what it is alone, to one level; steps are shared."""
    other = Reference(vokens=vokens(11), seed=3)
    requests = [
        request(1, seed=7),
        request(2, reference=FIRST),
        request(3, reference=FIRST),
        request(12, seed=4, reference=other),
        request(13, seed=5),
    ]
    alone = [decoder.draw([one])[0] for one in requests]
    sizes: list[int] = []
    handle = decoder.diffusion.denoiser.register_forward_pre_hook(lambda unet, inputs: sizes.append(len(inputs[0])))
    together = decoder.draw(requests)
    handle.remove()
    assert sizes == [2 * (5 + 3)] * 3
    for one, beside, events in zip(alone, together, run(new_decoder(), requests), strict=True):
        assert np.abs(pixels(one) - pixels(beside)).max() <= 1
        assert np.abs(pixels(one) - pixels(events[-1])).max() <= 1  # type: ignore[arg-type]


def test_a_reference_changes_a_picture_and_is_part_of_what_it_is(decoder: DiffusionDecoder) -> None:
    found = [request(2), request(2, reference=FIRST), request(2, reference=dataclasses.replace(FIRST, seed=8))]
    assert len({content_key(one) for one in found}) == 3
    drawn = decoder.draw(found)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(pixels(drawn[one]) - pixels(drawn[other])).max() > 1


def test_what_stands_in_for_the_denoiser_draws_pages_without_a_reference_alone() -> None:
    decoder = new_decoder()
    unet, sizes = decoder.diffusion.denoiser, [0]

    def stand_in(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(latents))
        return unet(latents, *args, **kwargs)

    requests = [request(2, reference=FIRST), request(3), request(4)]
    expected = new_decoder().draw(requests)
    decoder.diffusion.stand_ins["denoiser"] = stand_in
    drawn = decoder.draw(requests)
    assert sum(sizes) == 2 * 2 * FAST.steps + 2 * 2, "and the first step of all, which decides a picture's layout"
    for one, other in zip(expected, drawn, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.parametrize(("steps", "first"), [(1, 0), (2, 1), (20, 1)])
def test_the_step_that_decides_a_pictures_layout_has_no_reference(
    decoder: DiffusionDecoder, steps: int, first: int
) -> None:
    draw = DrawSettings(steps=steps, guidance_scale=1.0)
    condition = decoder.condition(vokens(2))
    reference, page = (
        Denoising(decoder.diffusion, condition, seed=seed, draw=draw, guidance_rescale=0.0) for seed in (1, 2)
    )
    page.reference = reference
    shown = []
    for page.num_calls in range(steps):
        shown.append(page.shown_reference is reference)
    assert shown == [False] * first + [True] * (steps - first)


def test_a_reference_has_places_of_its_own() -> None:
    decoder = new_decoder(max_batch=2)
    run(decoder, [request(page, reference=FIRST) for page in (2, 3)])
    assert decoder.occupancy.num_steps == 2 * FAST.steps, "one guided picture with its reference fills a batch of two"


def test_a_reference_that_does_not_fit_is_refused(decoder: DiffusionDecoder, tmp_path: Path) -> None:
    foreign = dataclasses.replace(FIRST, vokens=vokens(1, fingerprint="a" * 64))
    with pytest.raises(FingerprintMismatch):
        decoder.validate_request(request(2, reference=foreign))
    flux.make(tmp_path / "flux", **next(iter(flux.VARIANTS.values())))
    from minigpt5.model.decoders.load import load_diffusion

    config = tiny_config()
    other = DiffusionDecoder(config, tiny_mapper(config), load_diffusion(tmp_path / "flux"))
    with pytest.raises(InvalidRequest, match=r"FluxTransformer2DModel \(Flux\) has no self-attention") as refusal:
        other.validate_request(
            dataclasses.replace(request(2, reference=FIRST), settings=DrawSettings(scheduler="euler"))
        )
    assert refusal.value.field == "consistency"


@pytest.mark.parametrize(
    "changed",
    [
        {"up_block_types": ("UpBlock2D", "UpBlock2D")},
        {"only_cross_attention": True},
    ],
)
def test_a_unet_whose_up_blocks_have_no_self_attention_shares_none(changed: dict[str, Any]) -> None:
    config = tiny_config()
    diffusion = tiny_diffusion(config)
    assert diffusion.shares_attention
    options = {key: value for key, value in diffusion.denoiser.config.items() if not key.startswith("_")}
    diffusion.denoiser = UNet2DConditionModel(**{**options, **changed})
    assert not diffusion.shares_attention
    decoder = DiffusionDecoder(config, tiny_mapper(config), diffusion)
    with pytest.raises(InvalidRequest, match="has no self-attention that pictures could share"):
        decoder.validate_request(request(2, reference=FIRST))
