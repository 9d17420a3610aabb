"""A model folder from base models: `python -m minigpt5.new --language BASE --diffusion BASE --out FOLDER`.

A BASE is a folder or a hub id, which may name a revision (owner/name@revision). Base models are read and never written:
the new folder names them, with the hashes of their weights, and holds what training will change. With --dry-run only
their config files are read, and nothing is written: sizes and memory are known before any weights are downloaded.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt5.config import NO_VISION, BaseHash, LoraConfig, ModelConfig, VisionConfig
from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.footprint import Parts, read_parts, report
from minigpt5.types import DrawSettings, Sampling

if TYPE_CHECKING:
    from minigpt5.model.language import LanguageModel

DEFAULT_CONTEXT = 2048
"""Tokens. More costs memory in every slot of the KV store, whether it is used or not."""
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
QFORMER_WIDTH, QFORMER_LAYERS, HEAD_WIDTH = 768, 6, 64
"""Widest Q-Former of a new folder, its layers, and the width of an attention head of new parts."""
CHECKED_TOKENS = 16
TOLERANCE = 1e-4
"""Largest deviation of logits, as a share of the largest one."""
SEED = 0


def make_folder(
    out: str | Path,
    *,
    language: str,
    diffusion: str,
    vision: str = "none",
    context_tokens: int | None = None,
) -> Parts:
    """Write a model folder that names its base models, and return the model.

    The language model, the denoiser and the vision tower are each run once. Raises ModelFolderError where a base model
    does not fit or `out` is taken, BaseModelNotFound where it is not there.
    """
    from minigpt5.model import folder as model_folder

    out = Path(out).expanduser().absolute()
    if out.exists():
        raise ModelFolderError(f"{out} exists: name a new folder with --out")
    with _readable():
        parts = combine(
            language=language, diffusion=diffusion, vision=vision, context_tokens=context_tokens, name=out.name
        )
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        model_folder.save(partial, parts.config, language=parts.language, mapper=parts.mapper, vision=parts.vision)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parts


@contextmanager
def _readable() -> Iterator[None]:
    """Say which error of transformers or diffusers a base gave. Raises ModelFolderError."""
    from minigpt5.story.stream import describe

    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(
            f"a base model cannot be read ({type(error).__name__}: {describe(error)}): name folders in the layouts of "
            "transformers and diffusers"
        ) from error


def sketch(*, language: str, diffusion: str, vision: str = "none", context_tokens: int | None = None) -> Parts:
    """The model that `make_folder` would make, without weights: the config files of the bases are all that is read.

    No part is run, and nothing is written. Raises as `make_folder` does.
    """
    from transformers import AutoConfig

    from minigpt5.model.base_models import resolve
    from minigpt5.model.vision import TowerEncoder

    with _readable():
        bases = {base: resolve(base, has_weights=False) for base in (language, diffusion, vision) if base != "none"}
        language_config = AutoConfig.from_pretrained(bases[language])
        sizes = _language_sizes(bases[language], language_config, context_tokens) | _diffusion_sizes(bases[diffusion])
        tower = TowerEncoder(bases[vision], has_weights=False) if vision != "none" else None
        config = ModelConfig(
            name="sketch",
            language_model=language,
            vision=_vision_config(tower, vision) if tower else NO_VISION,
            text_encoder=diffusion,
            diffusion=diffusion,
            vocabulary=language_config.vocab_size,  # the tokenizer may have fewer
            **sizes,
        )
        return read_parts(config, language=bases[language], diffusion=bases[diffusion], tower=tower)


def combine(
    *, language: str, diffusion: str, vision: str, context_tokens: int | None = None, name: str = "own"
) -> Parts:
    """Load base models, infer every size from them, and put fresh parts between them. Raises as `make_folder` does."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from minigpt5.model.base_models import pin, resolve
    from minigpt5.model.cache import hash_weights
    from minigpt5.model.diffusion import Diffusion
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.text_encoder import load_text_encoder
    from minigpt5.model.vision import TowerEncoder, Vision

    torch.manual_seed(SEED)
    bases = {base: resolve(base) for base in (language, diffusion, vision) if base != "none"}
    ids = {base: pin(base, folder) for base, folder in bases.items()}
    sizes = _language_sizes(bases[language], AutoConfig.from_pretrained(bases[language]), context_tokens)
    sizes |= _diffusion_sizes(bases[diffusion])
    tower = TowerEncoder(bases[vision]) if vision != "none" else None
    config = ModelConfig(
        name=name,
        language_model=ids[language],
        vision=_vision_config(tower, ids[vision]) if tower else NO_VISION,
        text_encoder=ids[diffusion],
        diffusion=ids[diffusion],
        vocabulary=len(AutoTokenizer.from_pretrained(bases[language])),
        sampling=Sampling(temperature=0.7, top_p=0.9, max_page_tokens=128),
        draw=DrawSettings(steps=50, guidance_scale=7.5, scheduler="ddim"),
        bases=tuple(BaseHash(id=ids[base], sha256=hash_weights(folder)) for base, folder in bases.items()),
        **sizes,
    )
    parts = Parts(
        config=config,
        language=_load_language(bases[language], config),
        vision=Vision(config, tower),
        mapper=Mapper(config),
        diffusion=Diffusion.from_pretrained(bases[diffusion]),
        text_encoder=load_text_encoder(bases[diffusion], config),
    )
    _check_denoiser(parts, bases[diffusion])
    return parts


def _language_sizes(folder: Path, config: Any, context_tokens: int | None) -> dict[str, Any]:
    """The fields of ModelConfig that a language model's own config decides."""
    if hasattr(config, "vision_config"):
        raise ModelFolderError(f"{folder} is a vision-language model ({config.model_type}): name its text-only sibling")
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{folder} is an encoder-decoder ({config.model_type}): name a causal language model")
    sees = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)]
    longest = min((tokens for tokens in sees if tokens), default=DEFAULT_CONTEXT)
    if context_tokens and context_tokens > longest:
        raise ModelFolderError(f"context is {context_tokens} but {folder} sees {longest} tokens: name at most that")
    return {
        "hidden": config.hidden_size,
        "context_tokens": context_tokens or min(DEFAULT_CONTEXT, longest),
        "lora": LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, targets=find_lora_targets(folder)),
    }


def find_lora_targets(folder: Path) -> tuple[str, ...]:
    """The attention's query and value layers, as published, or the layer that holds both, as in Phi-3."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        body = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    linears = {name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    fused = sorted(name for name in linears if "qkv" in name.lower() or name in ("query_key_value", "c_attn"))
    if {"q_proj", "v_proj"} <= linears:
        return ("q_proj", "v_proj")
    if not fused:
        raise ModelFolderError(
            f"{folder} has no attention layers that LoRA knows: it has {', '.join(sorted(linears)) or 'no linear ones'}"
        )
    return tuple(fused)


def _diffusion_sizes(folder: Path) -> dict[str, Any]:
    """The fields of ModelConfig that a diffusion model decides. Raises ModelFolderError where its kind does not fit."""
    configs = {}
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not path.is_file():
            raise ModelFolderError(f"{folder} has no {part}/: name a Stable Diffusion 1.x or 2.x in diffusers' layout")
        configs[part] = json.loads(path.read_text())
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    if unet.get("addition_embed_type") or not isinstance(width, int) or channels != vae.get("latent_channels", 4):
        kind = unet.get("addition_embed_type") or f"{channels} input channels and condition width {width}"
        raise ModelFolderError(f"{folder} is no Stable Diffusion 1.x or 2.x (its UNet has {kind}): name one of these")
    if text["hidden_size"] != width:
        raise ModelFolderError(
            f"the text encoder of {folder} has width {text['hidden_size']} but its UNet reads {width}"
        )
    return {
        "condition_length": text.get("max_position_embeddings", 77),
        "condition_width": width,
        "mapper_heads": max(1, width // max(HEAD_WIDTH, width // 8)),
        "image_px": unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
    }


def _vision_config(tower: Any, base_id: str) -> VisionConfig:
    """Sizes of a tower, from one look at a black picture, and of the Q-Former that reads it."""
    import torch

    prepared_1CYX = tower.prepare(torch.zeros(1, 3, 64, 64))
    features_1FE = tower(prepared_1CYX.to(tower.network.device))
    hidden = min(QFORMER_WIDTH, features_1FE.shape[2])
    heads = max(1, hidden // HEAD_WIDTH)
    return VisionConfig(
        family="tower",
        encoder=base_id,
        image_px=prepared_1CYX.shape[-1],
        encoder_width=features_1FE.shape[2],
        num_features=features_1FE.shape[1],
        hidden=hidden - hidden % heads,
        num_layers=QFORMER_LAYERS,
        num_heads=heads,
    )


def _load_language(folder: Path, config: ModelConfig) -> LanguageModel:
    """The language model with fresh vokens, after its logits and its KV store were compared with its own library's."""
    import torch
    from transformers import AutoModelForCausalLM

    from minigpt5.engine.kv_cache import SlotCache
    from minigpt5.model.language import LanguageModel, load_tokenizer

    load_tokenizer(folder, config)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    causal.eval().requires_grad_(False)
    ids_1S = torch.randint(config.vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        expected_1ST = causal(input_ids=ids_1S, use_cache=False).logits[..., : config.vocabulary]
        language = LanguageModel.from_causal(causal, config, folder)
        states_1SH = language.states(language.embed(ids_1S))
        _check_close(language.logits(states_1SH)[..., : config.vocabulary], expected_1ST, f"the logits of {folder}")
        attention = causal.config._attn_implementation
        try:
            cache = SlotCache.for_model(language.body, num_slots=1, num_positions=2 * CHECKED_TOKENS)
            cached_SH = cache.forward(language.body, language.embed(ids_1S)[0], [(0, CHECKED_TOKENS)])
        except (AttributeError, TypeError, RuntimeError, AssertionError) as error:
            kind = causal.config.model_type
            raise ModelFolderError(
                f"{folder} is a {kind}, which the KV store does not fit ({error}): Llama, Qwen and Mistral models do"
            ) from error
        _check_close(cached_SH[None], states_1SH, f"the states of {folder} from the KV store")
        language.body.set_attn_implementation(attention)
    language.initialise_vokens(seed=SEED)
    return language


def _check_close(found: Any, expected: Any, name: str) -> None:
    deviation = float((found - expected).abs().max() / expected.abs().max())
    if deviation > TOLERANCE:
        raise ModelFolderError(
            f"{name} deviate by {deviation:.1e} of the largest from its own library's: this family does not fit; "
            "Llama, Qwen and Mistral models do"
        )


def _check_denoiser(parts: Parts, folder: Path) -> None:
    """One call of the denoiser on what the mapper makes of fresh vokens, and one picture of the VAE."""
    import torch

    from minigpt5.engine.denoising import denoise

    config = parts.config
    null_1QD = parts.mapper.null_condition().detach()
    if (expected := parts.text_encoder([""]).shape) != null_1QD.shape:
        raise ModelFolderError(
            f"the text encoder of {folder} gives states {tuple(expected[1:])}, the mapper {tuple(null_1QD.shape[1:])}"
        )
    one_step = DrawSettings(steps=1, guidance_scale=1.0, scheduler=config.draw.scheduler)
    with torch.no_grad():
        pixels_1CYX = denoise(parts.diffusion, null_1QD, null_1QD, seeds=[SEED], draw=one_step)
    if pixels_1CYX.shape[2:] != (config.image_px, config.image_px):
        raise ModelFolderError(f"{folder} draws {tuple(pixels_1CYX.shape[2:])} pixels, not {config.image_px}")


def main(arguments: list[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5.new", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", required=True, metavar="BASE", help="causal language model: Llama, Qwen, Mistral")
    parser.add_argument("--diffusion", required=True, metavar="BASE", help="Stable Diffusion 1.x or 2.x")
    parser.add_argument(
        "--vision",
        default="none",
        metavar="BASE",
        help="reads pictures: CLIP, SigLIP, DINOv2 (default none)",
    )
    parser.add_argument("--context", type=int, help=f"tokens of a story with its prompt (default {DEFAULT_CONTEXT})")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="the new model folder")
    goal.add_argument("--dry-run", action="store_true", help="print sizes and memory, from config files alone")
    options = parser.parse_args(arguments)
    bases = {"language": options.language, "diffusion": options.diffusion, "vision": options.vision}
    try:
        if options.dry_run:
            show(report(sketch(**bases, context_tokens=options.context)))
            return 0
        parts = make_folder(options.out, **bases, context_tokens=options.context)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(report(parts))
    show(f"\n{options.out} is ready to be trained: python -m training.train align --start {options.out} --data ROWS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
