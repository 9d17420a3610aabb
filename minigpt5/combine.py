"""A new model from base models, with fresh parts between them: whole, or as shapes without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt5.config import NO_VISION, BaseHash, ModelConfig, TemplateName
from minigpt5.errors import ModelFolderError
from minigpt5.model.base_sizes import diffusion_sizes, language_sizes, tower_config
from minigpt5.types import DrawSettings, Sampling

if TYPE_CHECKING:
    from torch import nn

    from minigpt5.model.decoders.diffusion import Diffusion
    from minigpt5.model.language import LanguageModel
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.vision import Vision

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
    text_encoder: nn.Module


@contextmanager
def _readable() -> Iterator[None]:
    """Say which error of transformers or diffusers a base gave. Raises ModelFolderError."""
    from safetensors import SafetensorError

    from minigpt5.story.stream import describe

    unreadable = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
    try:
        yield
    except unreadable as error:
        raise ModelFolderError(
            f"a base model cannot be read ({type(error).__name__}: {describe(error)}): name folders in the layouts of "
            "transformers and diffusers"
        ) from error


@_readable()
def combine(
    *,
    language: str,
    diffusion: str,
    vision: str | None = None,
    image_px: int | None = None,
    context_tokens: int | None = None,
    condition_length: int | None = None,
    template: TemplateName | None = None,
    name: str = "own",
) -> Parts:
    """Load base models, infer every size from them, and put fresh parts between them.

    The arguments are those of `minigpt5.new.make_folder`. The language model, the denoiser and the vision tower are
    each run once. Raises ModelFolderError where a base model does not fit, BaseModelNotFound where it is not there.
    """
    import torch

    from minigpt5.model.base_models import pin, resolve
    from minigpt5.model.cache import hash_weights
    from minigpt5.model.chat_template import find_caption_opening
    from minigpt5.model.decoders.load import load_diffusion
    from minigpt5.model.language import load_base
    from minigpt5.model.libraries import load_base_tokenizer
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.text_encoder import load_text_encoder
    from minigpt5.model.vision import Vision, load_tower
    from minigpt5.model.vision_language import OwnEncoder

    torch.manual_seed(SEED)
    bases = {base: resolve(base) for base in _named(language, diffusion, vision)}
    ids = {base: pin(base, folder) for base, folder in bases.items()}
    vision = _choose_vision(vision, bases[language], image_px)
    sizes = language_sizes(bases[language], context_tokens) | diffusion_sizes(bases[diffusion], condition_length)
    hashes = tuple(BaseHash(id=ids[base], sha256=hash_weights(folder)) for base, folder in bases.items())
    tokenizer = load_base_tokenizer(bases[language])
    base = load_base(bases[language])
    if len(tokenizer) > (rows := len(base.get_input_embeddings().weight)):
        raise ModelFolderError(
            f"the tokenizer of {bases[language]} has {len(tokenizer)} tokens and its embedding {rows} rows: name a "
            "model whose embedding was resized for added tokens, or take them out of the tokenizer"
        )
    sizes["vocabulary"] = len(tokenizer)
    if vision == "own":
        encoder: Any = OwnEncoder(base, bases[language], image_px=image_px)
        vision_config = encoder.vision_config(ids[language], tokenizer)
    elif vision == "none":
        encoder, vision_config = None, NO_VISION
    else:
        encoder = load_tower(bases[vision])
        vision_config = tower_config(encoder, ids[vision])
    model = load_diffusion(bases[diffusion])
    config = ModelConfig(
        name=name,
        language_model=ids[language],
        vision=vision_config,
        text_encoder=ids[diffusion],
        diffusion=ids[diffusion],
        template=template or ("chat" if tokenizer.chat_template else "published"),
        caption_opens=find_caption_opening(tokenizer),
        sampling=Sampling(temperature=0.7, top_p=0.9, max_page_tokens=128),
        bases=hashes,
        schedulers=model.samplers,
        guides_in_one_call=not model.is_guided(DrawSettings(guidance_scale=2.0)),
        size_multiple=model.multiple,
        consistency="off" if model.shares_attention else "none",
        **sizes,
    )
    parts = Parts(
        config=config,
        language=_load_language(base, bases[language], config),
        vision=Vision(config, encoder),
        mapper=Mapper(config),
        diffusion=model,
        text_encoder=load_text_encoder(bases[diffusion], config),
    )
    if vision == "own":
        _check_pictures(base, parts, bases[language])
        encoder.drop_text_half()
    _check_denoiser(parts, bases[diffusion])
    return parts


@_readable()
def sketch(
    *,
    language: str,
    diffusion: str,
    vision: str | None = None,
    image_px: int | None = None,
    context_tokens: int | None = None,
    condition_length: int | None = None,
) -> Parts:
    """The model that `combine` would make, on the meta device: the config files of the bases are all that is read.

    Such parts have shapes and no weights: they can be counted, and take no memory. No part is run. The tokens of a
    picture that "own" reads are not known. Raises as `combine` does.
    """
    import torch

    from minigpt5.model.base_models import resolve
    from minigpt5.model.decoders.load import sketch_diffusion, sketch_text_encoder
    from minigpt5.model.language import LanguageModel, load_base
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.vision import Vision, load_tower
    from minigpt5.model.vision_language import OwnEncoder

    bases = {base: resolve(base, has_weights=False) for base in _named(language, diffusion, vision)}
    vision = _choose_vision(vision, bases[language], image_px)
    sizes = language_sizes(bases[language], context_tokens) | diffusion_sizes(bases[diffusion], condition_length)
    base = load_base(bases[language], has_weights=False)
    if vision == "own":
        encoder: Any = OwnEncoder(base, bases[language], image_px=image_px)
        vision_config = dataclasses.replace(NO_VISION, family="own", encoder=language, image_px=encoder.image_px)
    elif vision == "none":
        encoder, vision_config = None, NO_VISION
    else:
        encoder = load_tower(bases[vision], has_weights=False)
        vision_config = tower_config(encoder, vision)
    config = ModelConfig(
        name="sketch",
        language_model=language,
        vision=vision_config,
        text_encoder=diffusion,
        diffusion=diffusion,
        **sizes,
    )
    denoiser = sketch_diffusion(bases[diffusion])
    text_encoder = sketch_text_encoder(bases[diffusion])
    with torch.device("meta"):
        parts = Parts(
            config=config,
            language=LanguageModel.from_causal(base, config, bases[language]),
            vision=Vision(config, encoder),
            mapper=Mapper(config),
            diffusion=denoiser,
            text_encoder=text_encoder,
        )
    if vision == "own":
        encoder.drop_text_half()
    return parts


def _named(*bases: str | None) -> list[str]:
    """The base models among what the options name."""
    return [base for base in bases if base and base not in ("none", "own")]


def _choose_vision(vision: str | None, language: Path, image_px: int | None) -> str:
    """What reads pictures, for the language model in `language`. Raises ModelFolderError where it has no such thing."""
    from minigpt5.model.vision_language import find_family, is_vision_language

    has_own = is_vision_language(language)
    vision = vision or ("own" if has_own else "none")
    if vision == "own" and not has_own:
        raise ModelFolderError(f"{language} has no vision tower of its own: name one with --vision, or none")
    if image_px and vision != "own":
        raise ModelFolderError(f"image_px is {image_px} but vision is {vision}: only own takes a size; leave it out")
    if vision == "own":
        find_family(language)
    return vision


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
    one_step = dataclasses.replace(config.draw, steps=1, guidance_scale=1.0)
    with torch.no_grad():
        pixels_1CYX = denoise(parts.diffusion, null_1QD, null_1QD, seeds=[SEED], draw=one_step)
    if pixels_1CYX.shape[2:] != (config.image_px, config.image_px):
        raise ModelFolderError(f"{folder} draws {tuple(pixels_1CYX.shape[2:])} pixels, not {config.image_px}")
