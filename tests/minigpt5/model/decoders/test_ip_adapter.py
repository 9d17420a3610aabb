"""Pictures that a UNet attends to: as diffusers' own pipelines do, and in any company."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.own_model.tiny_bases import make_qwen3
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.errors import BaseModelNotFound, InvalidRequest, ModelFolderError
from minigpt5.model.decoders.ip_adapter import SCALE, IpAdapter
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.folder_config import check_folder
from minigpt5.new import make_folder
from minigpt5.parity.pictures import TOLERANCE, Pair
from minigpt5.types import DrawRequest, DrawSettings, InputImage, Vokens
from tests.helpers.ip_adapter import make_ip_adapter
from tests.helpers.pipelines import flux, stable_diffusion, stable_diffusion_xl

CASES = [(stable_diffusion, False), (stable_diffusion, True), (stable_diffusion_xl, False)]


def some_png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((50, 40), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=CASES, ids=["sd", "sd-plus", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    family, is_plus = request.param
    family.make(tmp_path / "model")
    pair = Pair(tmp_path / "model")
    pair.folder = make_ip_adapter(tmp_path / "ip_adapter", pair.ours.denoiser, is_plus=is_plus)  # type: ignore[attr-defined]
    pair.ours.load_ip_adapter(pair.folder)  # type: ignore[attr-defined]
    yield pair


def start(pair: Pair, draw: DrawSettings, pictures: list[bytes], *, seed: int = 5) -> Denoising:
    characters = pair.ours.ip_adapter.states(pictures) if pictures else None
    return Denoising(pair.ours, pair.condition_QD, seed=seed, draw=draw, guidance_rescale=0.0, characters=characters)


def finish(pair: Pair, *pictures: Denoising) -> list[Tensor]:
    while pictures[0].num_calls_left:
        advance(pair.ours, pictures, pair.null_1QD)
    return [picture.latents_1CYX for picture in pictures]


def test_a_line_of_pixels_takes_no_more_than_its_middle(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor resizes the short side and then cuts: 1 x 4,000 pixels took gigabytes."""
    adapter, prepare, seen = pair.ours.ip_adapter, pair.ours.ip_adapter._prepare, []
    monkeypatch.setattr(adapter, "_prepare", lambda picture, **_: seen.append(picture.size) or prepare(picture, **_))

    def png(width: int, height: int) -> bytes:
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[height // 2 :, width // 2 :] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    adapter.states([png(1, 4000), png(300, 20), png(50, 40)])
    assert seen == [(1, 2), (40, 20), (50, 40)]
    whole, middle = (prepare(Image.open(io.BytesIO(png(width, 20))), return_tensors="pt") for width in (300, 40))
    torch.testing.assert_close(whole.pixel_values, middle.pixel_values)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_characters_are_drawn_as_the_pipeline_draws_them(pair: Pair, scale: float) -> None:
    side = pair.ours.native_px
    draw = DrawSettings(steps=4, guidance_scale=scale, scheduler=pair.ours.samplers[0], width=side, height=side)
    one, two = some_png(1), some_png(2)
    ours = {
        name: finish(pair, start(pair, draw, shown))[0]
        for name, shown in {"one": [one], "two": [one, two], "none": []}.items()
    }
    sampler = pair.ours.noise.samplers[draw.scheduler]
    pair.pipeline.scheduler = sampler.scheduler.from_config(pair._schedule, **pair.ours.noise.options(sampler))
    pair.pipeline.load_ip_adapter(pair.folder, subfolder="", weight_name="ip_adapter.safetensors")  # type: ignore[attr-defined]
    pair.pipeline.set_ip_adapter_scale(SCALE)
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in (one, two)]
    for name, shown in {"one": opened[0], "two": [opened]}.items():
        theirs = pair.pipeline(
            **pair.asked,
            ip_adapter_image=shown,
            num_inference_steps=4,
            guidance_scale=scale,
            width=side,
            height=side,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        assert (ours[name] - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name
        assert (ours["none"] - theirs).abs().max() > 10 * TOLERANCE * theirs.abs().max()


def test_pictures_with_and_without_characters_share_a_call(pair: Pair) -> None:
    side = pair.ours.native_px
    draw = DrawSettings(steps=3, guidance_scale=3.0, scheduler=pair.ours.samplers[0], width=side, height=side)
    shown = [[], [some_png(1)], [some_png(1), some_png(2)], [some_png(3)]]
    alone = [finish(pair, start(pair, draw, pictures, seed=seed))[0] for seed, pictures in enumerate(shown)]
    calls: list[int] = []
    handle = pair.ours.denoiser.register_forward_pre_hook(
        lambda unet, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    together = finish(pair, *(start(pair, draw, pictures, seed=seed) for seed, pictures in enumerate(shown)))
    handle.remove()
    assert calls == [8, 8, 8]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_unet_is_refused(tmp_path: Path) -> None:
    stable_diffusion.make(tmp_path / "sd")
    stable_diffusion_xl.make(tmp_path / "xl")
    sd, xl = load_diffusion(tmp_path / "sd"), load_diffusion(tmp_path / "xl")
    folder = make_ip_adapter(tmp_path / "ip_adapter", xl.denoiser)
    with pytest.raises(ModelFolderError, match="no IP-Adapter of this model's UNet2DConditionModel"):
        sd.load_ip_adapter(folder)
    (folder / "ip_adapter.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="cannot be read"):
        IpAdapter.from_folder(folder, xl.denoiser)


def test_a_new_folder_takes_an_adapter_along_and_says_that_it_has_one(tmp_path: Path) -> None:
    make_qwen3(tmp_path / "qwen3")
    stable_diffusion.make(tmp_path / "sd")
    made = make_ip_adapter(tmp_path / "made", load_diffusion(tmp_path / "sd").denoiser)
    bases = {"language": str(tmp_path / "qwen3"), "diffusion": str(tmp_path / "sd"), "context_tokens": 512}
    plain = make_folder(tmp_path / "plain", **bases).config  # type: ignore[arg-type]
    make_folder(tmp_path / "own", **bases, ip_adapter=str(made / "ip_adapter.safetensors"))  # type: ignore[arg-type]
    config = check_folder(tmp_path / "own")
    assert (plain.has_ip_adapter, config.has_ip_adapter) == (False, True)
    assert config.fingerprint == check_folder(tmp_path / "plain").fingerprint, "vokens are the same with and without"
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "own", backend="eager")
    states = np.random.default_rng(1).standard_normal((config.num_vokens, config.hidden), np.float32)
    draw = dataclasses.replace(config.draw, steps=2)
    plainly = DrawRequest(
        vokens=Vokens(page=1, hidden_VH=states, fingerprint=config.fingerprint), seed=1, settings=draw
    )
    shown = dataclasses.replace(plainly, characters=(InputImage(data=some_png(1)),))
    decoder.validate_request(shown)
    drawn = decoder.draw([plainly, shown, dataclasses.replace(shown, characters=(InputImage(data=some_png(2)),))])
    assert len({picture.png for picture in drawn}) == 3
    assert drawn[1].png == decoder.draw([shown])[0].png
    with pytest.raises(InvalidRequest, match="plain does not have"):
        DiffusionDecoder.from_pretrained(tmp_path / "plain", backend="eager").validate_request(shown)
    with pytest.raises(BaseModelNotFound, match="image_encoder/model.safetensors beside it"):
        make_folder(tmp_path / "none", **bases, ip_adapter=str(tmp_path / "qwen3" / "model.safetensors"))  # type: ignore[arg-type]


def test_a_family_without_one_says_so(tmp_path: Path) -> None:
    flux.make(tmp_path / "flux", **next(iter(flux.VARIANTS.values())))
    with pytest.raises(ModelFolderError, match="FluxTransformer2DModel"):
        load_diffusion(tmp_path / "flux").load_ip_adapter(tmp_path)
