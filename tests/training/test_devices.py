"""The objective where weights lie on another device than the CPU: torch's lazy device, which computes with the CPU's
own kernels, but refuses what lies elsewhere, as a GPU does."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.example import Example
from minigpt5.objective.losses import LossWeights
from minigpt5.objective.objective import Objective
from tests.helpers.tiny import SomeStates, tiny_config, tiny_diffusion, tiny_language
from tests.minigpt5.objective.test_losses import caption, new_objective, story
from training import devices
from training.presets import Preset
from training.stages.distill import DistillObjective
from training.stages.model import halve_frozen
from training.storybook.presets import STORYBOOK

PRESET = Preset(stage="align", steps=1, batch_size=1)
WEIGHTS = LossWeights(text=1.0, picture=1.0, caption=1.0, contrast=1.0)


def rows() -> list[Example]:
    """Bare captions, and whole sequences with pictures that are drawn and pictures that are read."""
    contrasts = [["a cat", "a dog"], ["a house", "a tree"]]
    pictures = [np.full((32, 32, 3), shade, np.uint8) for shade in (30, 200)]
    segments = PUBLISHED.next_page(["One."], "Two.", "text", variant=0)
    reads = Example(segments=segments, read=pictures, drawn=[], captions=[])
    captions = [dataclasses.replace(caption(words), contrasts=contrasts[:1]) for words in ("a fox", "an owl")]
    return [*captions, reads, dataclasses.replace(story(), contrasts=contrasts)]


@torch.no_grad()
def losses_of(objective: Objective) -> dict[str, float]:
    torch.manual_seed(0)
    losses = objective(rows(), WEIGHTS)
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


def test_another_device_has_the_cpus_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = new_objective()
    objective.samples_latents = True
    objective.whiten_vokens(torch.randn(24, 8, 48), torch.randn(24, 6, 16), noise=0.1)
    expected = losses_of(objective)
    assert {"text", "picture", "caption", "contrast"} <= set(expected)
    device = lazy_device(monkeypatch)
    objective.to(device)
    assert losses_of(objective) == pytest.approx(expected, rel=1e-3)
    assert next(objective.settle().parameters()).device.type == device.type


def test_what_the_stages_of_the_diffusion_model_move_lies_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of them take this device minutes: what had not come along, by itself."""
    objective = DistillObjective(
        tiny_diffusion(tiny_config(), is_distilled=True),
        SomeStates(),  # type: ignore[arg-type]
        STORYBOOK["distill"],
        guidance_scale=3.0,
        guidance_rescale=0.7,
    )
    timesteps_B = torch.tensor([999, -1])
    expected = [level.tolist() for level in objective._signal_and_noise(timesteps_B)]
    device = lazy_device(monkeypatch)
    objective.to(device)
    noise_schedule = objective.diffusion.noise_schedule
    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(device)  # as adding noise leaves them
    levels = objective._signal_and_noise(timesteps_B)
    assert [level.device.type for level in levels] == [device.type] * 2
    assert [level.tolist() for level in levels] == expected
    pixels = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8).to(device)
    moved_BCYX = to_tensor(pixels)
    assert moved_BCYX.device.type == device.type and (to_pixels(moved_BCYX) == 255).all()


def test_frozen_matrices_in_half_the_memory_have_autocasts_own_losses() -> None:
    found = []
    for is_halved in (False, True):
        objective = new_objective()
        if is_halved:
            halve_frozen(objective.language.body)
            halve_frozen(objective.vision.encoder)
            assert objective.language.embedding.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(losses_of(objective))
    assert found[0] == pytest.approx(found[1], rel=2e-2)


def test_a_frozen_adapter_is_not_rounded() -> None:
    """It is saved again by stages that do not train it."""
    config = tiny_config()
    language = tiny_language(config)
    language.add_adapter(config.lora)
    language.body.requires_grad_(False)
    before = {name: p.clone() for name, p in language.body.named_parameters() if "lora_" in name}
    halve_frozen(language.body)
    after = dict(language.body.named_parameters())
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    assert language.embedding.dtype == torch.bfloat16


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(PRESET, bf16=True)
    for has_it in (False, True):
        monkeypatch.setattr(devices, "_has_bfloat16", lambda has_it=has_it: has_it)
        assert devices.for_device(asked, torch.device("cpu")).bf16 == has_it
        assert devices.for_device(asked, torch.device("cuda")).bf16
        assert devices.for_device(PRESET, torch.device("cpu")).bf16 is False


def lazy_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    import torch._lazy.ts_backend

    with contextlib.suppress(RuntimeError):  # it is there
        torch._lazy.ts_backend.init()

    # By other means where this device has no kernel.
    def split(self: torch.Tensor, size: int | list[int], dim: int = 0) -> list[torch.Tensor]:
        whole = self.shape[dim]
        sizes = size if isinstance(size, list) else [min(size, whole - at) for at in range(0, whole, size)]
        return [self.narrow(dim, sum(sizes[:k]), one) for k, one in enumerate(sizes)]

    def chunk(self: torch.Tensor, chunks: int, dim: int = 0) -> list[torch.Tensor]:
        return split(self, -(-self.shape[dim] // chunks), dim)

    def masked_scatter(self: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        places = (mask[..., 0].flatten().long().cumsum(0) - 1).clamp(min=0)
        return torch.where(mask, source[places].view(self.shape), self)

    for name, function in (("split", split), ("chunk", chunk), ("masked_scatter", masked_scatter)):
        monkeypatch.setattr(torch.Tensor, name, function)
    monkeypatch.setattr(torch, "chunk", chunk)
    return torch.device("lazy")
