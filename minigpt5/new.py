"""A model folder from base models: `python -m minigpt5.new --language BASE --diffusion BASE --out FOLDER`.

A BASE is a folder or a hub id, which may name a revision (owner/name@revision). Base models are read and never written:
the new folder names them, with the hashes of their weights, and holds what training will change.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from minigpt5.config import NO_VISION, BaseHash, LoraConfig, ModelConfig, TemplateName, VisionConfig
from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.types import DrawSettings, Sampling

if TYPE_CHECKING:
    from minigpt5.model.diffusion import Diffusion
    from minigpt5.model.language import LanguageModel
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.text_encoder import ClipTextEncoder, TextEncoder
    from minigpt5.model.vision import Vision

DEFAULT_CONTEXT = 2048
"""Tokens. More costs memory in every slot of the KV store, whether it is used or not."""
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
QFORMER_WIDTH, QFORMER_LAYERS, HEAD_WIDTH = 768, 6, 64
"""Widest Q-Former of a new folder, its layers, and the width of an attention head of new parts."""
CHECKED_TOKENS = 16
TOLERANCE = 1e-4
"""Largest deviation of logits, as a share of the largest one."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All of a new model: base models, and fresh parts between them."""

    config: ModelConfig
    language: LanguageModel
    vision: Vision
    mapper: Mapper
    diffusion: Diffusion
    text_encoder: TextEncoder | ClipTextEncoder


def make_folder(
    out: str | Path,
    *,
    language: str,
    diffusion: str,
    vision: str | None = None,
    image_px: int | None = None,
    context_tokens: int | None = None,
    template: TemplateName | None = None,
) -> Parts:
    """Write a model folder that names its base models, and return the model.

    `vision`: a tower, "own" for that of a vision-language model, or "none"; without it, "own" where there is one.
    `image_px`: side of the pictures that "own" reads. `template`: by default "chat" where the tokenizer has a chat
    template. The language model, the denoiser and the vision tower are each run once. Raises ModelFolderError where a
    base model does not fit or `out` is taken, BaseModelNotFound where it is not there.
    """
    from minigpt5.model import folder as model_folder
    from minigpt5.story.stream import describe

    out = Path(out).expanduser().absolute()
    if out.exists():
        raise ModelFolderError(f"{out} exists: name a new folder with --out")
    try:
        parts = combine(
            language=language,
            diffusion=diffusion,
            vision=vision,
            image_px=image_px,
            context_tokens=context_tokens,
            template=template,
            name=out.name,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(
            f"a base model cannot be read ({type(error).__name__}: {describe(error)}): name folders in the layouts of "
            "transformers and diffusers"
        ) from error
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        model_folder.save(partial, parts.config, language=parts.language, mapper=parts.mapper, vision=parts.vision)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parts


def combine(
    *,
    language: str,
    diffusion: str,
    vision: str | None = None,
    image_px: int | None = None,
    context_tokens: int | None = None,
    template: TemplateName | None = None,
    name: str = "own",
) -> Parts:
    """Load base models, infer every size from them, and put fresh parts between them. Raises as `make_folder` does."""
    import torch
    from transformers import AutoTokenizer

    from minigpt5.model.base_models import pin, resolve
    from minigpt5.model.cache import hash_weights
    from minigpt5.model.diffusion import Diffusion
    from minigpt5.model.language import load_base
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.text_encoder import load_text_encoder
    from minigpt5.model.vision import TowerEncoder, Vision
    from minigpt5.model.vision_language import OwnEncoder, find_family, is_vision_language

    torch.manual_seed(SEED)
    bases = {base: resolve(base) for base in (language, diffusion, vision) if base not in (None, "none", "own")}
    ids = {base: pin(base, folder) for base, folder in bases.items()}
    has_own = is_vision_language(bases[language])
    vision = vision or ("own" if has_own else "none")
    if vision == "own" and not has_own:
        raise ModelFolderError(f"{language} has no vision tower of its own: name one with --vision, or none")
    if image_px and vision != "own":
        raise ModelFolderError(f"image_px is {image_px} but vision is {vision}: only own takes a size; leave it out")
    if vision == "own":
        find_family(bases[language])
    sizes = _language_sizes(bases[language], context_tokens, template) | _diffusion_sizes(bases[diffusion])
    hashes = tuple(BaseHash(id=ids[base], sha256=hash_weights(folder)) for base, folder in bases.items())
    base = load_base(bases[language])
    if vision == "own":
        encoder: Any = OwnEncoder(base, bases[language], image_px=image_px)
        vision_config = encoder.vision_config(ids[language], AutoTokenizer.from_pretrained(bases[language]))
    elif vision == "none":
        encoder, vision_config = None, NO_VISION
    else:
        encoder = TowerEncoder(bases[vision])
        vision_config = _vision_config(encoder, ids[vision])
    config = ModelConfig(
        name=name,
        language_model=ids[language],
        vision=vision_config,
        text_encoder=ids[diffusion],
        diffusion=ids[diffusion],
        sampling=Sampling(temperature=0.7, top_p=0.9, max_page_tokens=128),
        draw=DrawSettings(steps=50, guidance_scale=7.5, scheduler="ddim"),
        bases=hashes,
        **sizes,
    )
    parts = Parts(
        config=config,
        language=_load_language(base, bases[language], config),
        vision=Vision(config, encoder),
        mapper=Mapper(config),
        diffusion=Diffusion.from_pretrained(bases[diffusion]),
        text_encoder=load_text_encoder(bases[diffusion], config),
    )
    if vision == "own":
        _check_pictures(base, parts, bases[language])
        encoder.drop_text_half()
    _check_denoiser(parts, bases[diffusion])
    return parts


def _language_sizes(folder: Path, context_tokens: int | None, template: TemplateName | None) -> dict[str, Any]:
    """The fields of ModelConfig that a language model decides."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder).get_text_config()
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{folder} is an encoder-decoder ({config.model_type}): name a causal language model")
    longest = longest_context(config)
    if context_tokens and context_tokens > longest:
        raise ModelFolderError(f"context is {context_tokens} but {folder} sees {longest} tokens: name at most that")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "hidden": config.hidden_size,
        "vocabulary": len(tokenizer),
        "template": template or ("chat" if tokenizer.chat_template else "published"),
        "context_tokens": context_tokens or min(DEFAULT_CONTEXT, longest),
        "lora": LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, targets=find_lora_targets(folder)),
    }


def longest_context(config: Any) -> int:
    """Tokens that a language model reads with one set of positions.

    Past its original length, "longrope" turns every position by other angles. Keys that are in the KV store by then
    would have the wrong ones, and so would shorter stories of the same step.
    """
    longest: int = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_kind = [one for one in rope.values() if isinstance(one, dict)]
    originals = [
        one["original_max_position_embeddings"] for one in by_layer_kind or [rope] if one.get("rope_type") == "longrope"
    ]
    return min(longest, *originals) if originals else longest


def find_lora_targets(folder: Path) -> tuple[str, ...]:
    """The attention's query and value layers, as published, or the layer that holds both, as in Phi-3."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        body = AutoModel.from_config(config := AutoConfig.from_pretrained(folder))
    body = body.get_decoder() if hasattr(config, "vision_config") else body
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
    features_1FE = tower(prepared_1CYX)
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


def _check_pictures(base: Any, parts: Parts, folder: Path) -> None:
    """Compare the states of a text with two pictures with those of its own library."""
    import numpy as np
    import torch

    from minigpt5.model.language import load_tokenizer
    from minigpt5.model.prompt import READ, encode, text_segment

    config, language = parts.config, parts.language
    segments = [text_segment("1"), READ, text_segment("2"), READ, text_segment("3")]
    tokens = encode(
        segments,
        load_tokenizer(folder, config),
        language.voken_embeddings,
        picture_tokens=config.vision.picture_tokens,
    )
    ids_1S, placeholder = torch.tensor([tokens.ids]), language.voken_embeddings.placeholder
    shape = (config.vision.image_px, config.vision.image_px, 3)
    pictures = [np.random.default_rng(SEED + number).integers(256, size=shape, dtype=np.uint8) for number in range(2)]
    with torch.no_grad():
        expected_1SH = parts.vision.encoder.own_states(base, ids_1S, pictures, placeholder=placeholder)
        embeds_1SH = language.embed(ids_1S, parts.vision(pictures))
        states_1SH = language.states(embeds_1SH, is_picture_BS=ids_1S == placeholder)
    _check_close(states_1SH, expected_1SH, f"the states of {folder} after pictures")


def _load_language(causal: Any, folder: Path, config: ModelConfig) -> LanguageModel:
    """The language model with fresh vokens, after its logits and its KV store were compared with its own library's."""
    import torch

    from minigpt5.engine.kv_cache import SlotCache
    from minigpt5.model.language import LanguageModel, load_tokenizer
    from minigpt5.model.template import make_template

    make_template(config, load_tokenizer(folder, config))
    ids_1S = torch.randint(config.vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        expected_1ST = causal(input_ids=ids_1S, use_cache=False).logits[..., : config.vocabulary]
        language = LanguageModel.from_causal(causal, config, folder)
        states_1SH = language.states(language.embed(ids_1S))
        _check_close(language.logits(states_1SH)[..., : config.vocabulary], expected_1ST, f"the logits of {folder}")
        attention = language.body.config._attn_implementation
        try:
            cache = SlotCache.for_model(language.body, num_slots=1, num_positions=2 * CHECKED_TOKENS)
            cached_SH = cache.forward(language.body, language.embed(ids_1S)[0], [(0, CHECKED_TOKENS)])
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:
            kind = causal.config.model_type
            raise ModelFolderError(
                f"{folder} is a {kind}, which the KV store cannot serve ({error}): name a model whose layers attend "
                "through transformers' attention interface"
            ) from error
        _check_close(cached_SH[None], states_1SH, f"the states of {folder} from the KV store")
        language.body.set_attn_implementation(attention)
    language.initialise_vokens(seed=SEED)
    return language


def _check_close(found: Any, expected: Any, name: str) -> None:
    deviation = float((found - expected).abs().max() / expected.abs().max())
    if not deviation <= TOLERANCE:
        raise ModelFolderError(
            f"{name} deviate by {deviation:.1e} of the largest from its own library's, and at most {TOLERANCE:.0e} is "
            "allowed: name another language model"
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


def report(parts: Parts) -> str:
    """Parameters, what each stage trains, and memory, as lines of text."""
    config = parts.config
    sizes = {
        "language model": _count(parts.language.body) + _head_size(parts.language),
        "vision encoder": _count(parts.vision.encoder),
        "Q-Former": _count(parts.vision.qformer),
        "voken embeddings": _count(parts.language.voken_embeddings),
        "mapper": _count(parts.mapper),
        "UNet": _count(parts.diffusion.unet),
        "VAE": _count(parts.diffusion.vae),
        "text encoder": _count(parts.text_encoder),
    }
    lora = _lora_size(parts.language, config)
    trained = {
        "vision": sizes["Q-Former"],
        "align": sizes["voken embeddings"] + sizes["mapper"],
        # As published, learn leaves `fc` and the queries as align made them.
        "learn": sizes["voken embeddings"] + _count(parts.mapper.transformer) + lora,
    }
    lines = ["parameters", *(f"  {name:18}{number:>16,}" for name, number in sizes.items() if number)]
    lines += [f"  {'LoRA':18}{lora:>16,}", "trained by stage"]
    lines += [f"  {stage:18}{number:>16,}" for stage, number in trained.items() if number]
    lines += [f"template {config.template}", "memory in GB, without activations"]
    for name, gigabytes in memory_gb(parts, sizes | {"LoRA": lora}, trained).items():
        lines.append(f"  {name:38}{gigabytes:8.2f}")
    return "\n".join(lines)


def memory_gb(parts: Parts, sizes: dict[str, int], trained: dict[str, int]) -> dict[str, float]:
    """Memory of weights, the KV store and optimizer states, on a CPU (float32) and on a GPU (the language model in
    bfloat16, and all that is frozen while training)."""
    from minigpt5.engine.generator import DEFAULT_SLOTS
    from minigpt5.engine.kv_cache import bytes_per_token

    writes = sizes["language model"] + sizes["voken embeddings"]
    sees = sizes["vision encoder"] + sizes["Q-Former"]
    draws = sum(sizes[name] for name in ("mapper", "UNet", "VAE"))
    stored = DEFAULT_SLOTS * parts.config.context_tokens
    everything = sum(sizes.values())
    found = {}
    for place, width in (("CPU", 4), ("GPU", 2)):
        store = stored * bytes_per_token(parts.language.body, width)
        found[f"VokenGenerator on a {place}, weights"] = (width * writes + 4 * sees) / 1e9
        found[f"VokenGenerator on a {place}, KV store"] = store / 1e9
    found["DiffusionDecoder, weights"] = 4 * draws / 1e9
    for stage, number in trained.items():
        if number:
            found[f"{stage} on a GPU, one worker"] = (2 * (everything - number) + 16 * number) / 1e9
    return found


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head_size(language: LanguageModel) -> int:
    return 0 if language.head.weight is language.embedding else _count(language.head)


def _lora_size(language: LanguageModel, config: ModelConfig) -> int:
    """Rank times both sides of every adapted matrix."""
    adapted = [
        module for name, module in language.body.named_modules() if name.rpartition(".")[2] in config.lora.targets
    ]
    return sum(config.lora.rank * sum(module.weight.shape) for module in adapted)


def main(arguments: list[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5.new", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--language",
        required=True,
        metavar="BASE",
        help="causal language model of transformers, or a vision-language model",
    )
    parser.add_argument("--diffusion", required=True, metavar="BASE", help="Stable Diffusion 1.x or 2.x")
    parser.add_argument(
        "--vision",
        metavar="BASE",
        help="reads pictures: own (the vision-language model's, the default where there is one), none, or a tower: "
        "CLIP, SigLIP, DINOv2",
    )
    parser.add_argument("--image-px", type=int, help="side of a picture that own reads: more pixels take more tokens")
    parser.add_argument("--context", type=int, help=f"tokens of a story with its prompt (default {DEFAULT_CONTEXT})")
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        help="of prompts: the paper's, or the language model's own (default \"chat\" where its tokenizer has one)",
    )
    parser.add_argument("--out", required=True, help="the new model folder")
    options = parser.parse_args(arguments)
    try:
        parts = make_folder(
            options.out,
            language=options.language,
            diffusion=options.diffusion,
            vision=options.vision,
            image_px=options.image_px,
            context_tokens=options.context,
            template=options.template,
        )
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(report(parts))
    show(f"\n{options.out} is ready to be trained: python -m training.train align --start {options.out} --data ROWS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
