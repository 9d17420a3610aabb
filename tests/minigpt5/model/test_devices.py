"""The engines' steps where weights lie on another device than the CPU: the meta device, which computes nothing, but
refuses to be mixed with the CPU as a GPU does."""

from __future__ import annotations

import pytest
import torch

from minigpt5.engine.denoising import Denoising, advance
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.types import DrawSettings
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_language, tiny_mapper


@pytest.mark.parametrize("num_shared_blocks", [None, 8], ids=["whole slots", "blocks"])
@torch.no_grad()
def test_a_step_of_the_language_model_stays_on_its_device(num_shared_blocks: int | None) -> None:
    config = tiny_config()
    language = tiny_language(config).to("meta")
    cache = SlotCache.for_model(language.body, num_slots=4, num_positions=64, num_shared_blocks=num_shared_blocks)
    for slot in range(3):
        cache.take(slot, 64, idle=[])
    assert cache.stored_keys[0].device.type == "meta"
    for counts in ([(0, 5), (1, 3)], [(0, 1), (1, 1), (2, 4)]):
        ids_1T = torch.zeros(1, sum(num for _, num in counts), dtype=torch.long)
        states_TH = cache.forward(language.body, language.embed(ids_1T)[0], counts)
        assert language.logits(states_TH).device.type == "meta"


@pytest.mark.parametrize("scheduler", sorted(VariancePreserving.samplers))
def test_a_denoising_step_stays_on_its_device(scheduler: str) -> None:
    config = tiny_config()
    mapper, diffusion = tiny_mapper(config).to("meta"), tiny_diffusion(config, is_distilled=True).to("meta")
    null_1QD = mapper.null_condition()
    condition_1QD = mapper(torch.zeros(1, config.num_vokens, config.hidden).to("meta"))
    settings = DrawSettings(steps=3, guidance_scale=3.0, scheduler=scheduler)
    picture = Denoising(diffusion, condition_1QD[0], seed=1, draw=settings, guidance_rescale=0.7)
    for _ in range(2):  # after which the distilled UNet is given new noise
        advance(diffusion, [picture], null_1QD)
    assert picture.latents_1CYX.device.type == "meta"
    assert diffusion.to_pixels(picture.latents_1CYX).device.type == "meta"
