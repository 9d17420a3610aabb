"""Style adapters beside diffusers' own pipeline, in any company, and files that are no styles."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.denoising import denoise
from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.model import folder as model_folder
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.decoders.styles import MAX_RANK, STYLE_BYTES, Styles, check_style_file
from minigpt5.model.folder_config import check_folder, load_config, write_config
from minigpt5.types import STYLE_FILE, DrawRequest, DrawSettings, Picture
from tests.helpers.pipelines import stable_diffusion
from tests.helpers.styles import ATTENTION, save_style
from tests.helpers.tiny import save_tiny, tiny_language, tiny_mapper, tiny_vision
from tests.minigpt5.engine.test_decoder import run, vokens

INK = DrawSettings(steps=3, guidance_scale=2.0, style="ink")
OIL = dataclasses.replace(INK, style="oil")
NONE = dataclasses.replace(INK, style="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two styles, of different layers and ranks."""
    folder = tmp_path_factory.mktemp("styles") / "model"
    save_tiny(folder)
    unet = load_diffusion(folder / "decoder").denoiser
    save_style(folder / "adapters" / "ink", unet, seed=1)
    save_style(folder / "adapters" / "oil", unet, seed=2, rank=3, targets=ATTENTION)
    return folder


@pytest.fixture
def decoder(folder: Path) -> DiffusionDecoder:
    return DiffusionDecoder.from_pretrained(folder, device="cpu", num_threads=1, backend="eager")


def request(draw: DrawSettings, page: int = 1) -> DrawRequest:
    return DrawRequest(vokens=vokens(page, fingerprint=""), seed=page, settings=draw)


def asked(decoder: DiffusionDecoder, *requests: DrawRequest) -> list[DrawRequest]:
    return [
        dataclasses.replace(one, vokens=dataclasses.replace(one.vokens, fingerprint=decoder.fingerprint))
        for one in requests
    ]


def pngs(decoder: DiffusionDecoder, *requests: DrawRequest) -> list[bytes]:
    """Drawn at once, by the engine's thread."""
    return [events[-1].png for events in run(decoder, asked(decoder, *requests)) if isinstance(events[-1], Picture)]


def test_styles_at_once_have_the_bits_that_each_has_alone(folder: Path, decoder: DiffusionDecoder) -> None:
    requests = [request(draw, page) for page in (1, 2) for draw in (INK, OIL, NONE)]
    together = pngs(decoder, *requests)
    assert len(set(together)) == len(requests)
    for one, expected in zip(requests, together, strict=True):
        alone = DiffusionDecoder.from_pretrained(folder, device="cpu", num_threads=1, backend="eager")
        assert pngs(alone, one) == [expected], one.settings.style


def test_without_a_style_the_picture_is_that_of_a_model_without_styles(
    folder: Path, decoder: DiffusionDecoder, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("adapters"))
    plain = DiffusionDecoder.from_pretrained(tmp_path / "plain", device="cpu", num_threads=1, backend="eager")
    assert plain.fingerprint == decoder.fingerprint
    pngs(decoder, request(INK))
    assert pngs(decoder, request(NONE)) == pngs(plain, request(NONE))
    with pytest.raises(InvalidRequest, match="style is 'ink' but this model has no styles"):
        plain.validate_request(*asked(plain, request(INK)))


def draw_with_pipeline(folder: Path, style: Path, condition: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True)
    pipeline.scheduler = load_diffusion(folder).noise.new_sampler("ddim")
    pipeline.load_lora_weights(style)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=null,
        latents=torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5)),
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="pt",
    ).images


def test_a_style_draws_as_in_the_pipeline_of_diffusers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    stable_diffusion.make(base)
    diffusion = load_diffusion(base)
    noise = torch.Generator().manual_seed(1)
    condition_1QD, null_1QD = (torch.randn(1, 7, 32, generator=noise) for _ in range(2))
    for seed, name in enumerate(("ink", "oil"), start=1):
        save_style(tmp_path / name, diffusion.denoiser, seed=seed, rank=2 + seed)
    diffusion.styles = Styles(diffusion.denoiser, tmp_path, pipeline="StableDiffusionPipeline", prefix="unet")
    drawn = {}
    for name in ("ink", "oil", "ink"):
        draw = DrawSettings(steps=4, guidance_scale=2.0, style=name)
        drawn[name] = (denoise(diffusion, condition_1QD, null_1QD, seeds=[5], draw=draw) + 1) / 2
        expected = draw_with_pipeline(base, tmp_path / name, condition_1QD, null_1QD)
        assert (drawn[name] - expected).abs().max() <= 1e-4, name
    assert (drawn["ink"] - drawn["oil"]).abs().max() > 1e-2


def test_the_least_recently_used_style_leaves(folder: Path) -> None:
    diffusion = load_diffusion(folder / "decoder")
    save_style(folder.parent / "more" / "wash", diffusion.denoiser, seed=3)
    for name in ("ink", "oil"):
        shutil.copytree(folder / "adapters" / name, folder.parent / "more" / name)
    styles = Styles(
        diffusion.denoiser,
        folder.parent / "more",
        pipeline="StableDiffusionPipeline",
        prefix="unet",
        max_bytes=2 * sum(value.nbytes for value in load_file(folder / "adapters" / "ink" / STYLE_FILE).values()),
    )
    seen = []
    for name in ("ink", "oil", "ink", "wash", "oil", ""):
        styles.use(name)
        seen.append(styles.loaded)
    assert seen[:4] == [("ink",), ("ink", "oil"), ("oil", "ink"), ("ink", "wash")]
    held = {key.split(".style_")[1].split(".")[0] for key in diffusion.denoiser.state_dict() if ".style_" in key}
    assert held == set(styles.loaded)


def write_style(folder: Path, tensors: dict[str, torch.Tensor], **said: object) -> Path:
    folder.mkdir(parents=True)
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(said)} if said else {"format": "pt"}
    save_file(tensors, folder / STYLE_FILE, metadata=metadata)
    return folder / STYLE_FILE


def bad_file(kind: str, path: Path, good: dict[str, torch.Tensor]) -> None:
    lora_b = next(key for key in good if "lora_B" in key)
    if kind == "pickle":
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps({"weights": [1.0]}))
    elif kind == "shapes":
        write_style(path.parent, good | {lora_b: torch.zeros(5, good[lora_b].shape[1])})
    elif kind == "layers":
        write_style(path.parent, good | {"unet.tower.to_q.lora_A.weight": torch.zeros(4, 16)})
    elif kind == "text":
        write_style(path.parent, {"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 16)})
    elif kind == "rank":
        write_style(path.parent, good | {lora_b: torch.zeros(1, MAX_RANK + 1)})
    elif kind == "said":
        write_style(path.parent, good, **{"unet.r": 10**9, "unet.lora_alpha": 4})
    elif kind == "list":
        path.parent.mkdir(parents=True)
        save_file(good, path, metadata={LORA_ADAPTER_METADATA_KEY: "[1]"})
    elif kind == "scalars":
        write_style(path.parent, {key: torch.tensor(1.0) for key in good})
    elif kind == "pattern":
        write_style(path.parent, good, **{"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {"(": 3}})
    elif kind == "alphas":
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        two = {"lora_down.weight": torch.zeros(2, 16), "lora_up.weight": torch.zeros(16, 2), "alpha": torch.ones(2)}
        write_style(path.parent, {f"{name}.{part}": value for part, value in two.items()})
    elif kind == "size":
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(STYLE_BYTES + 1)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("pickle", "is no safetensors file"),
        ("shapes", "does not fit"),
        ("layers", "does not fit"),
        ("text", "no tensor's name begins with 'unet'"),
        ("rank", f"rank {MAX_RANK + 1} but must have at most"),
        ("said", "rank 1000000000 but must have at most"),
        ("list", "does not fit"),
        ("scalars", "does not fit"),
        ("pattern", "does not fit"),
        ("alphas", "does not fit"),
        ("size", f"{STYLE_BYTES + 1} bytes but a style must have"),
    ],
)
def test_a_bad_file_fails_its_own_picture_only(folder: Path, tmp_path: Path, kind: str, why: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "adapters" / "bad" / STYLE_FILE
    bad_file(kind, path, load_file(folder / "adapters" / "ink" / STYLE_FILE))
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "model", device="cpu", num_threads=1, backend="eager")
    expected = pngs(decoder, request(OIL, 2), request(NONE, 2))
    bad = request(dataclasses.replace(INK, style="bad"))

    async def draw() -> list[object]:
        async def last(one: DrawRequest) -> object:
            return [event async for event in decoder.decode(one)][-1]

        decoder._pictures._values.clear()
        return await asyncio.gather(
            *map(last, asked(decoder, bad, request(OIL, 2), request(NONE, 2))), return_exceptions=True
        )

    failure, *pictures = asyncio.run(draw())
    assert isinstance(failure, ModelFolderError)
    assert str(path) in str(failure) and why in str(failure)
    assert [picture.png for picture in pictures] == expected  # type: ignore[attr-defined]


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=STYLE_FILE):
        check_style_file(tmp_path / STYLE_FILE)


def test_a_pickle_beside_a_style_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "adapters" / "ink" / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=r"pickled files \(pytorch_lora_weights.bin\)"):
        check_folder(tmp_path / "model")


@pytest.mark.parametrize("style", ["../ink", "adapters/ink", "Ink", "pen", "/"])
def test_a_style_that_the_folder_has_not_is_refused(decoder: DiffusionDecoder, style: str) -> None:
    with pytest.raises(InvalidRequest, match="must be one of ink, oil, or left out"):
        decoder.validate_request(*asked(decoder, request(dataclasses.replace(INK, style=style))))
    with pytest.raises(InvalidRequest):
        decoder.config.draw_settings({"style": style})


def test_the_distilled_unet_draws_no_style(folder: Path) -> None:
    config = dataclasses.replace(
        load_config(folder), draw_distilled=model_folder.DISTILLED_DRAW, prefers_distilled=True
    )
    assert config.draw_settings({"style": "ink"}) == dataclasses.replace(config.draw, style="ink")
    with pytest.raises(InvalidRequest, match="style is 'ink' but must be none with scheduler 'distilled'"):
        config.draw_settings({"style": "ink", "scheduler": "distilled"})


def test_a_name_that_is_not_plain_is_an_error_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "adapters" / "ink").rename(tmp_path / "model" / "adapters" / "ink.v2")
    with pytest.raises(ModelFolderError, match=r"has a style 'ink\.v2' but a name must be"):
        load_config(tmp_path / "model")


def test_a_saved_folder_has_the_styles_of_the_one_it_came_from(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder)
    parts = {"language": tiny_language(config), "mapper": tiny_mapper(config), "vision": tiny_vision(config)}
    saved = model_folder.save(tmp_path / "next", config, start=folder, **parts)
    assert saved.styles == load_config(tmp_path / "next").styles == ("ink", "oil")
    assert "styles" not in json.loads((tmp_path / "next" / "config.json").read_text())
    other = model_folder.save(
        tmp_path / "other",
        config,
        start=folder,
        decoder={"vae": folder / "decoder", "unet": folder / "decoder"},
        **parts,
    )
    assert other.styles == ()


def test_a_config_may_draw_in_a_style_with_few_steps(folder: Path, tmp_path: Path) -> None:
    """As LCM-LoRA (arXiv 2311.05556) does: an adapter, a sampler and no guidance."""
    shutil.copytree(folder, tmp_path / "model")
    fast = DrawSettings(steps=2, guidance_scale=1.0, scheduler="lcm", style="ink")
    write_config(tmp_path / "model", dataclasses.replace(load_config(folder), draw=fast, schedulers=("ddim", "lcm")))
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "model", device="cpu", num_threads=1, backend="eager")
    draw = decoder.config.draw_settings({})
    assert draw == fast
    plain = decoder.config.draw_settings({"style": ""})
    drawn, without = pngs(decoder, request(draw), request(plain))
    assert drawn != without
    assert decoder.diffusion.styles is not None and decoder.diffusion.styles.loaded == ("ink",)


def test_layers_of_an_adapter_are_batch_invariant_too(decoder: DiffusionDecoder) -> None:
    decoder.diffusion.use_style("ink")
    added = {name: layer for name, layer in decoder.diffusion.denoiser.named_modules() if ".style_ink" in name}
    assert any("time_emb_proj" in name for name in added) and any("conv_shortcut" in name for name in added)
    assert not [name for name, layer in added.items() if "time_emb_proj" in name and type(layer) is nn.Linear]
    assert not [name for name, layer in added.items() if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1)]
