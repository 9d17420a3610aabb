"""A second decoder of the VAE's latents: what it starts from, which pictures it paints, and where it lies."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minigpt5.config import ModelConfig
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.evaluation.systems.folder import MODEL, save_system
from minigpt5.model import folder as model_folder
from minigpt5.model.backends.choose import choose, warm_up
from minigpt5.model.backends.openvino import Converted
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.decoders.upscaling import UpscalingDecoder, encode_alike, load_upscaling
from minigpt5.model.folder_config import load_config
from minigpt5.types import UPSCALING_FOLDER, DrawRequest, DrawSettings, Picture, Vokens
from tests.helpers.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_language, tiny_mapper, tiny_vision
from training.stages.model import find_decoder
from training.weight_sources import WeightSources

FAST = DrawSettings(steps=3, guidance_scale=1.0, scheduler="ddim")
OWN = dataclasses.replace(FAST, width=32, height=32)


def upscaled(scale: int = 2) -> StableDiffusion:
    """The tiny model with a second decoder whose fresh blocks are not what they begin as."""
    diffusion = tiny_diffusion(tiny_config())
    torch.manual_seed(4)
    diffusion.upscaling = UpscalingDecoder.from_vae(diffusion.vae, scale=scale).eval()
    for parameter in diffusion.upscaling.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return diffusion


def config_of(scale: int = 2) -> ModelConfig:
    return dataclasses.replace(tiny_config(), upscale=scale)


@pytest.fixture(scope="module")
def decoder() -> DiffusionDecoder:
    return DiffusionDecoder(config_of(), tiny_mapper(tiny_config()), upscaled())


def request(settings: DrawSettings = FAST, *, page: int = 1) -> DrawRequest:
    hidden_VH = np.random.default_rng(page).normal(size=(8, 48)).astype(np.float32)
    return DrawRequest(
        vokens=Vokens(page=page, hidden_VH=hidden_VH, fingerprint="f" * 64), seed=page, settings=settings
    )


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)


@pytest.mark.parametrize("scale", [2, 4])
def test_it_begins_as_the_vaes_decoder_whose_last_features_are_repeated(scale: int) -> None:
    vae = tiny_diffusion(tiny_config()).vae
    larger = UpscalingDecoder.from_vae(vae, scale=scale).eval()
    seen = {}
    for name, of in (("vae", vae.decoder), ("larger", larger.decoder)):
        of.conv_norm_out.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    latents_BCYX = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        vae.decode(latents_BCYX)
        painted_BCYX = larger.decode(latents_BCYX).sample
    assert painted_BCYX.shape == (2, 3, 32 * scale, 32 * scale)
    torch.testing.assert_close(seen["larger"], F.interpolate(seen["vae"], scale_factor=scale), atol=1e-5, rtol=0)


def test_a_scale_or_a_vae_that_it_cannot_extend_is_said() -> None:
    vae = tiny_diffusion(tiny_config()).vae
    for scale in (0, 1, 3):
        with pytest.raises(ModelFolderError, match=f"scale is {scale} but must be 2, 4"):
            UpscalingDecoder.from_vae(vae, scale=scale)
    with pytest.raises(ModelFolderError, match="a Linear cannot be extended: only an AutoencoderKL"):
        UpscalingDecoder.from_vae(torch.nn.Linear(1, 1), scale=2)  # type: ignore[arg-type]


def test_the_square_of_the_vae_is_its_own_and_all_else_is_painted_larger() -> None:
    diffusion = upscaled()
    assert [diffusion.scale_of(one) for one in (FAST, OWN, dataclasses.replace(FAST, width=64, height=32))] == [2, 1, 2]
    shapes = [diffusion.latent_shape(one) for one in (FAST, OWN, dataclasses.replace(FAST, width=64, height=32))]
    assert shapes == [(4, 8, 8), (4, 8, 8), (4, 4, 8)]
    with pytest.raises(InvalidRequest, match="width is 36 but must be a multiple of 8"):
        diffusion.latent_shape(dataclasses.replace(FAST, width=36, height=32))
    assert diffusion.to_pixels(torch.zeros(1, 4, 8, 8)).shape[-1] == 32
    assert diffusion.to_pixels(torch.zeros(1, 4, 8, 8), scale=2).shape[-1] == 64


def test_sizes_of_a_request() -> None:
    config = config_of()
    sizes = {(0, 0): (64, 64), (64, 64): (64, 64), (32, 32): (32, 32), (48, 48): (48, 48), (40, 40): (40, 40)}
    for (width, height), size in sizes.items():
        draw = dataclasses.replace(FAST, width=width, height=height)
        assert config.size_of(draw) == size
        native = config.native(draw)
        is_exact = size in ((64, 64), (32, 32), (48, 48))  # 40 is no multiple of 16
        assert config.is_resampled(draw) is not is_exact
        assert (native.width, native.height) == (size if size in ((32, 32), (48, 48)) else (0, 0))
    assert config.relative_pixels(FAST) == config.relative_pixels(OWN) == 1
    assert config.relative_pixels(dataclasses.replace(FAST, width=48, height=48)) == (48 / 64) ** 2
    assert tiny_config().drawn_px == 32


def test_the_largest_picture_has_as_many_latents_as_without_it() -> None:
    config = config_of()
    assert config.max_drawn_pixels == 4 * tiny_config().max_pixels == 128 * 96
    for width, is_resampled in ((128, False), (144, True)):
        assert config.is_resampled(dataclasses.replace(FAST, width=width, height=96)) is is_resampled


def test_pictures_of_every_size_beside_each_other_are_what_they_are_alone(decoder: DiffusionDecoder) -> None:
    asked = [
        request(),
        request(OWN),
        request(dataclasses.replace(FAST, width=40, height=40)),
        request(dataclasses.replace(FAST, width=48, height=48)),
        request(page=2),
    ]
    together = decoder.draw(asked)
    assert [one.width for one in together] == [64, 32, 40, 48, 64]
    assert [one.is_resampled for one in together] == [False, False, True, False, False]
    for one, picture in zip(asked, together, strict=True):
        assert np.abs(pixels(decoder.draw([one])[0]) - pixels(picture)).max() <= 1


def test_the_vaes_own_picture_is_the_one_that_is_drawn_without_a_second_decoder(decoder: DiffusionDecoder) -> None:
    plain = DiffusionDecoder(tiny_config(), tiny_mapper(tiny_config()), tiny_diffusion(tiny_config()))
    assert (pixels(decoder.draw([request(OWN)])[0]) == pixels(plain.draw([request()])[0])).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upscaling") / "model"
    save_tiny(folder)
    model_folder.save_part(upscaled().upscaling, folder / "decoder" / UPSCALING_FOLDER)
    model_folder.write_config(folder, load_config(folder))
    return folder


def test_a_model_folder_that_has_one_draws_larger_pictures(folder: Path) -> None:
    config = load_config(folder)
    assert (config.upscale, config.drawn_px) == (2, 64)
    assert "upscale" not in json.loads((folder / "config.json").read_text())
    decoder = DiffusionDecoder.from_pretrained(folder, backend="eager")
    asked = dataclasses.replace(request(), vokens=dataclasses.replace(request().vokens, fingerprint=config.fingerprint))
    assert [one.width for one in decoder.draw([asked, dataclasses.replace(asked, settings=OWN)])] == [64, 32]


def test_openvino_paints_what_torch_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    eager, converted = (upscaled() for _ in range(2))
    for one in (eager, converted):
        one.upscaling = load_upscaling(folder / "decoder" / UPSCALING_FOLDER).eval()
    null_1QD = torch.zeros(1, 6, 16)
    with torch.no_grad():
        choose(
            converted,
            folder / "decoder",
            null_1QD,
            upscaling=folder / "decoder",
            backend="openvino",
            device="cpu",
            num_threads=1,
        )
        assert isinstance(converted.stand_ins["upscaling"], Converted)
        warm_up(converted, null_1QD)
        assert all(converted.stand_ins[name]._is_right for name in ("vae", "upscaling")), "both were compared"
        latents_BCYX = torch.randn(2, 4, 8, 8)
        ours, theirs = (one.to_pixels(latents_BCYX, scale=2) for one in (converted, eager))
    assert ((ours - theirs) * 127.5).abs().max() <= 1
    assert all(converted.stand_ins["upscaling"]._is_right.values())


def test_training_keeps_it_and_a_foreign_or_damaged_one_is_said(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder)
    saved = model_folder.save(
        tmp_path / "trained",
        config,
        language=tiny_language(config),
        mapper=tiny_mapper(config),
        vision=tiny_vision(config),
        start=folder,
    )
    assert saved.upscale == 2
    weights = f"decoder/{UPSCALING_FOLDER}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "trained" / weights).read_bytes() == (folder / weights).read_bytes()
    with pytest.raises(ModelFolderError, match="is a AutoencoderKL, not a UpscalingDecoder"):
        load_upscaling(folder / "decoder" / "vae")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "decoder" / UPSCALING_FOLDER / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="is damaged or missing"):
        load_config(tmp_path / "damaged")


@pytest.mark.parametrize("is_encoder", [False, True])
def test_a_vae_whose_decoder_alone_was_trained_keeps_it(folder: Path, tmp_path: Path, is_encoder: bool) -> None:
    """As after the stages "unet", "decoder" and "sharpen", whose folders have no second decoder."""
    diffusion = tiny_diffusion(tiny_config())
    part: Any = diffusion.vae.encoder if is_encoder else diffusion.vae.decoder
    part.conv_out.bias.data += 0.25
    model_folder.save_diffusion(diffusion, tmp_path / "tuned")
    assert encode_alike(tmp_path / "tuned" / "vae", folder / "decoder" / "vae") is not is_encoder
    assert not encode_alike(tmp_path, folder / "decoder" / "vae")
    sources = WeightSources(runs=tmp_path, start=folder, decoder=tmp_path / "tuned")
    found = find_decoder(folder, load_config(folder), sources).parts
    assert found["vae"] == tmp_path / "tuned" and (UPSCALING_FOLDER in found) is not is_encoder
    save_system(tmp_path / "rival", "stable-diffusion", folder, decoder=tmp_path / "tuned")
    assert load_config(tmp_path / "rival" / MODEL).upscale == (1 if is_encoder else 2)
