"""The model folder: written by training and `minigpt5.new`, read by everything else. Safetensors and JSON only.

config.json           ModelConfig with the fingerprint
vokens.safetensors    rows of the embedding and the head
vocabulary.safetensors  the base model's own rows, where an imported checkpoint has others
mapper.safetensors    fc, queries, transformer
adapter/              LoRA in PEFT's format, after stage 2
prefix.safetensors    keys and values before every sequence, where stage 2 trained a prefix in place of LoRA
language/             the whole language model, where all of it was trained, in transformers' layout
vision/               Q-Former and projection; the frozen encoder, where it is no base model
decoder/              VAE, denoiser, scheduler/ in diffusers' layout, where they are no base model; in both cases
                      perhaps unet_distilled/, and vae_upscaling/, which paints larger pictures
adapters/<name>/      style adapters of the denoiser, in diffusers' format; the fingerprint does not cover them
ip_adapter/           IP-Adapter of the denoiser with its image encoder; nor these
examples/1.webp       a picture for the first of the config's examples, where somebody has put one there

Other parts are base models, which `config.json` names by path or hub id. They are read and never written.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt5.config import ModelConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model.base_models import resolve
from minigpt5.model.folder_config import DECODER, IP_ADAPTER, PICKLES, STYLES, check_folder, load_config, write_config
from minigpt5.model.locate import contains, find_part, locate
from minigpt5.model.weights import load_module, save_module, save_tensors
from minigpt5.types import (
    DISTILLED,
    DISTILLED_FOLDER,
    UPSCALING_FOLDER,
    DecoderBackend,
    DrawSettings,
    Precision,
    TextPrecision,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedTokenizerBase

    from minigpt5.model.decoders.diffusion import Diffusion
    from minigpt5.model.language import LanguageModel
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.prompt import Template
    from minigpt5.model.vision import Vision

DISTILLED_DRAW = DrawSettings(steps=4, guidance_scale=1.0, scheduler=DISTILLED)
LANGUAGE = "language"
VOKENS = "vokens.safetensors"
PREFIX = "prefix.safetensors"
MAPPER = "mapper.safetensors"
QFORMER = "vision/qformer.safetensors"
VOCABULARY = "vocabulary.safetensors"
MAX_EXAMPLE_PICTURE_BYTES = 32 * 1024
NOT_COPIED = (*(f"*{suffix}" for suffix in sorted(PICKLES)), "*.fp16.*")
"""Files beside the weights of a decoder that a model folder must not or need not have."""


def load_example_pictures(folder: str | Path, config: ModelConfig) -> dict[int, bytes]:
    """Number of an example, from 1 -> its picture as WebP bytes, for those that have one. Raises ModelFolderError."""
    found = {}
    for number in range(1, len(config.examples) + 1):
        path = Path(folder) / "examples" / f"{number}.webp"
        if path.is_file():
            found[number] = _read_webp(path)
    return found


def _read_webp(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_EXAMPLE_PICTURE_BYTES + 1)
    if len(data) > MAX_EXAMPLE_PICTURE_BYTES:
        raise ModelFolderError(f"{path} has over {MAX_EXAMPLE_PICTURE_BYTES} bytes: make it smaller or remove it")
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ModelFolderError(f"{path} begins with {data[:12]!r} and is no WebP picture: convert or remove it")
    return data


def default_device() -> str:
    """The GPU that this process sees, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_generator_model(
    folder: str | Path,
    *,
    device: str = "cpu",
    precision: TextPrecision | None = None,
    num_threads: int | None = None,
) -> tuple[ModelConfig, PreTrainedTokenizerBase, LanguageModel, Vision]:
    """What writes, ready to: config, tokenizer, language model with rows and adapter, vision path.

    `precision` of the language model: by default bfloat16 on a GPU, and on a CPU what `choose_precision` says
    for `num_threads` of torch.
    """
    import torch

    from minigpt5.model.language import load_tokenizer
    from minigpt5.model.precision import check_precision, choose_precision

    folder = locate(folder)
    config = check_folder(folder)
    is_on_cpu = torch.device(device).type == "cpu"
    base_folder = find_part(folder, config, config.language_model)
    if precision:
        check_precision(precision, base_folder, is_on_cpu=is_on_cpu)
    else:
        precision = choose_precision(base_folder, num_threads=num_threads) if is_on_cpu else "bfloat16"
    if precision == "int4":
        language, vision = _load_int4(folder, config, base_folder)
    else:
        language, vision = load_language_and_vision(folder, config)
        if is_on_cpu:
            language.pack(precision)
        elif precision == "bfloat16":
            for parameter in language.parameters():  # and no buffer: rotary frequencies need float32
                parameter.data = parameter.data.to(torch.bfloat16)
    return config, load_tokenizer(base_folder, config), language.to(device), vision.to(device)


def _load_int4(folder: Path, config: ModelConfig, base_folder: Path) -> tuple[LanguageModel, Vision]:
    """Language model and vision path, with the base model's own codes and the adapter beside them."""
    from minigpt5.model.language import load_base
    from minigpt5.model.packing import match_codes
    from minigpt5.model.quantised import load_codes
    from minigpt5.model.vision import Vision

    base = load_base(base_folder)
    codes = match_codes(base, load_codes(base_folder))
    language = load_language(folder, config, adapter="frozen", base=base)
    is_one = config.vision.family == "own"
    vision = Vision.from_base(config, base, base_folder) if is_one else load_vision(folder, config)
    language.pack("int4", codes)
    return language, vision


def load_decoder_model(
    folder: str | Path,
    *,
    device: str = "cpu",
    precision: Precision | None = None,
    backend: DecoderBackend = "eager",
    num_threads: int | None = None,
) -> tuple[ModelConfig, Mapper, Diffusion]:
    """What draws, ready to: config, mapper, diffusion model. docs/batch-invariance.md says how far a picture
    depends on its batch: on a CPU, layers of a UNet are mended, and those of a transformer are not.

    `precision` of the diffusion model: by default float32 on a CPU, and bfloat16 on a GPU, in half the memory.
    `backend`: what computes it; `num_threads` of OpenVINO, by default as many as torch has here.
    """
    import torch

    from minigpt5.model.backends.choose import choose, warm_up
    from minigpt5.model.batch_invariance import make_batch_invariant, mend_denoiser
    from minigpt5.model.decoders.load import load_diffusion
    from minigpt5.model.decoders.styles import Styles
    from minigpt5.model.decoders.upscaling import load_upscaling

    folder = locate(folder)
    config = check_folder(folder)
    mapper = load_mapper(folder, config)
    base = find_part(folder, config, config.diffusion)
    distilled = find_addition(DISTILLED_FOLDER, base, folder)
    diffusion = load_diffusion(base, distilled=distilled)
    if config.upscale > 1:
        diffusion.upscaling = load_upscaling(folder / DECODER / UPSCALING_FOLDER)
    diffusion.eval()
    with torch.no_grad():
        null_1QD = mapper.null_condition()
        choose(
            diffusion,
            base,
            null_1QD,
            distilled=distilled,
            upscaling=folder / DECODER,
            backend=backend,
            device=device,
            num_threads=num_threads or torch.get_num_threads(),
        )
    is_on_cpu = torch.device(device).type == "cpu"
    if is_on_cpu:  # what is mended there is oneDNN's
        make_batch_invariant(diffusion)
    if config.has_ip_adapter:
        diffusion.load_ip_adapter(folder / IP_ADAPTER)
    diffusion.hold_in(getattr(torch, precision or ("float32" if is_on_cpu else "bfloat16")))
    diffusion.styles = Styles(
        diffusion.denoiser,
        folder / STYLES,
        pipeline=diffusion.PIPELINES[0],
        prefix=diffusion.DENOISER,
        mend=mend_denoiser if is_on_cpu else lambda denoiser: None,
    )
    diffusion.to(device)
    warm_up(diffusion, null_1QD)
    return config, mapper.to(device), diffusion


Adapter = Literal["merged", "frozen", "trained"]
"""Where an adapter goes: into the weights, beside them, or beside them to be trained on."""


def load_language_and_vision(
    folder: Path,
    config: ModelConfig,
    *,
    adapter: Adapter = "merged",
    has_encoder: bool = True,
    keeps_dtype: bool = False,
) -> tuple[LanguageModel, Vision]:
    """All that reads and writes. A vision-language model, which is both, is read once. Without `has_encoder`, its
    vision path reads no pictures. `keeps_dtype` of the language model: see `stored_dtype`."""
    from minigpt5.model.language import load_base
    from minigpt5.model.vision import Vision

    found = find_part(folder, config, config.language_model)
    base = load_base(found, keeps_dtype=keeps_dtype)
    language = load_language(folder, config, adapter=adapter, base=base)
    if config.vision.family == "own" and has_encoder:
        return language, Vision.from_base(config, base, found)
    return language, load_vision(folder, config, has_encoder=has_encoder)


def load_language(folder: Path, config: ModelConfig, *, adapter: Adapter = "merged", base: Any = None) -> LanguageModel:
    """The language model with its rows and its adapter, where it has one. `base`: transformers' own model, where it has
    been read already."""
    from safetensors.torch import load_file

    from minigpt5.model.language import LanguageModel, load_base
    from minigpt5.model.prefix import load_prefix

    found = find_part(folder, config, config.language_model)
    language = LanguageModel.from_causal(base or load_base(found), config, found)
    if (vocabulary := folder / VOCABULARY).is_file():
        rows = load_file(vocabulary)
        language.replace_vocabulary(rows["embedding"], rows["head"])
    load_module(language.voken_embeddings, folder / VOKENS)
    if (folder / PREFIX).is_file():
        language.prefix = load_prefix(folder / PREFIX, language.body, context_tokens=config.context_tokens)
    if (folder / "adapter").is_dir():
        language.load_adapter(folder / "adapter", is_trained=adapter == "trained")
        if adapter == "merged":
            language.merge_adapter()
    return language


def load_template(folder: str | Path) -> Template:
    """The template of a model folder, without its weights. Raises as `find_part` does."""
    from minigpt5.model.language import load_tokenizer
    from minigpt5.model.published_template import PublishedTemplate
    from minigpt5.model.template import make_template

    config = load_config(folder)
    if config.template == "published":
        return PublishedTemplate(caption_opens=config.caption_opens)
    return make_template(config, load_tokenizer(find_part(folder, config, config.language_model), config))


def load_mapper(folder: Path, config: ModelConfig) -> Mapper:
    from minigpt5.model.mapper import Mapper

    mapper = Mapper(config)
    load_module(mapper, folder / MAPPER)
    return mapper


def load_vision(folder: Path, config: ModelConfig, *, has_encoder: bool = True) -> Vision:
    """The vision path of a model folder: its frozen encoder, from the folder or a base model, and its Q-Former.
    Without `has_encoder`, the Q-Former alone."""
    from minigpt5.model.vision import NoEncoder, Vision

    vision = new_vision(config, folder=folder) if has_encoder else Vision(config, NoEncoder())
    if config.vision.has_qformer:
        load_module(vision.qformer, folder / QFORMER)
    return vision


def new_vision(config: ModelConfig, *, folder: Path | None = None) -> Vision:
    """The vision path with its frozen encoder, from `folder` or a base model, and a fresh Q-Former."""
    from minigpt5.model.vision import Vision

    if config.vision.family == "none":
        return Vision(config)
    encoder = config.vision.encoder
    return Vision.from_encoder(config, find_part(folder, config, encoder) if folder else resolve(encoder))


def save(
    folder: str | Path,
    config: ModelConfig,
    *,
    language: LanguageModel,
    mapper: Mapper,
    vision: Vision,
    start: Path | None = None,
    decoder: Mapping[str, Path] | None = None,
) -> ModelConfig:
    """Write what was trained, as float16, and return the config with its fingerprint.

    Parts of the model folder `start` that are not trained are copied along: its vocabulary, vision encoder and decoder.
    `decoder` names folders to copy the decoder's parts and files from instead. Base models are named and never written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_module(language.voken_embeddings, folder / VOKENS)
    save_module(mapper, folder / MAPPER)
    if config.vision.has_qformer:
        save_module(vision.qformer, folder / QFORMER)
    if language.prefix:
        save_module(language.prefix.settle(), folder / PREFIX)
    if hasattr(language.body, "peft_config"):
        # By default PEFT asks the Hub for the base model, whose embeddings it might have to save: ours are frozen.
        language.body.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        _name_base(folder / "adapter" / "adapter_config.json", config.language_model)
        _halve(folder / "adapter" / "adapter_model.safetensors")
    if start and (start / VOCABULARY).is_file() and config.language_model != LANGUAGE:
        shutil.copyfile(start / VOCABULARY, folder / VOCABULARY)
    if start and contains(start, config.vision.encoder):
        ignored = shutil.ignore_patterns(*NOT_COPIED, Path(QFORMER).name)
        shutil.copytree(
            start / config.vision.encoder, folder / config.vision.encoder, ignore=ignored, dirs_exist_ok=True
        )
    return write_config(folder, _copy_decoder(folder, config, start=start, decoder=decoder))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, whole, or is removed."""
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_language(folder: Path, config: ModelConfig, language: LanguageModel, base: Path) -> ModelConfig:
    """Write a language model of which all weights were trained, as float16, beside what else its folder `base` holds.
    Returns the config that names it; `save` comes after."""
    from minigpt5.model.language import load_base

    place = folder / LANGUAGE
    shutil.copytree(base, place, ignore=shutil.ignore_patterns(*NOT_COPIED, "*.safetensors*"))
    causal = load_base(base, has_weights=False)
    names = {id(module): name for name, module in causal.named_modules()}
    body, head = names[id(causal.base_model)], names[id(causal.get_output_embeddings())]
    weights = {f"{body}.{name}": value for name, value in language.body.state_dict().items()}
    weights |= {f"{head}.{name}": value for name, value in language.head.state_dict().items()}
    is_tied = language.head.weight is language.embedding
    if is_tied:
        del weights[f"{head}.weight"]
    _describe_plain(place / "config.json", is_tied=is_tied)
    save_tensors({name: value.half() for name, value in weights.items()}, place / "model.safetensors")
    bases = tuple(one for one in config.bases if one.id != config.language_model)
    return dataclasses.replace(config, language_model=LANGUAGE, bases=bases)


def _describe_plain(file: Path, *, is_tied: bool) -> None:
    """Have transformers read a language model as it is saved, which the base need not have been: its weights may have
    been quantised, and published rows part a head from the embedding that it was."""
    values = json.loads(file.read_text())
    values.pop("quantization_config", None)
    file.write_text(json.dumps(values if is_tied else values | {"tie_word_embeddings": False}, indent=2) + "\n")


def save_distilled(
    folder: Path, config: ModelConfig, *, start: Path, distilled: ModelMixin, decoder: Mapping[str, Path] | None = None
) -> ModelConfig:
    """Write the model folder `start` with another distilled denoiser, as float16, and return the config. No other
    weights are read. `decoder`: as `save` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (VOKENS, MAPPER, VOCABULARY, PREFIX):
        if (start / name).is_file():
            shutil.copyfile(start / name, folder / name)
    _copy_folders(start, folder, LANGUAGE, "adapter", "vision", "examples", base=config.vision.encoder)
    config = _copy_decoder(folder, config, start=start, decoder=decoder)
    shutil.rmtree(folder / DECODER / DISTILLED_FOLDER, ignore_errors=True)
    save_part(distilled, folder / DECODER / DISTILLED_FOLDER)
    return write_config(folder, _with_distilled(config))


def _copy_decoder(
    folder: Path, config: ModelConfig, *, start: Path | None, decoder: Mapping[str, Path] | None
) -> ModelConfig:
    """Copy the decoder of `start` with its styles, or the parts of `decoder`, and return the config that names it."""
    if not decoder:
        if start:
            additions = (f"{DECODER}/{name}" for name in (DISTILLED_FOLDER, UPSCALING_FOLDER))
            _copy_folders(start, folder, *additions, STYLES, IP_ADAPTER, base=config.diffusion)
        return config
    for part, source in decoder.items():  # without styles: another decoder has other layers
        if (source / part).is_file():
            shutil.copyfile(source / part, folder / DECODER / part)
        else:
            shutil.copytree(source / part, folder / DECODER / part, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return dataclasses.replace(config, diffusion=DECODER)


def _copy_folders(start: Path, folder: Path, *own: str, base: str) -> None:
    """Copy the folders `own` that the model folder `start` has, and its part `base` where that is no base model."""
    for name in (*own, *([base] if contains(start, base) else [])):
        if (start / name).is_dir():
            shutil.copytree(start / name, folder / name, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)


def draws_with(config: ModelConfig, diffusion: Diffusion) -> ModelConfig:
    """The config with or without defaults of a distilled UNet, as there is one."""
    if diffusion.distilled is None:
        return dataclasses.replace(config, draw_distilled=None)
    return _with_distilled(config)


def _with_distilled(config: ModelConfig) -> ModelConfig:
    schedulers = tuple(dict.fromkeys([*config.schedulers, DISTILLED]))
    return dataclasses.replace(config, schedulers=schedulers, draw_distilled=config.draw_distilled or DISTILLED_DRAW)


def find_addition(name: str, decoder: Path, folder: Path | None) -> Path | None:
    """The place of `unet_distilled/` or `vae_upscaling/`: `decoder/` of the model folder, else beside what it adds to;
    None: there is none."""
    places = [folder / DECODER, decoder] if folder else [decoder]
    return next((place for place in places if (place / name).is_dir()), None)


def save_diffusion(diffusion: Diffusion, folder: Path) -> None:
    """Write VAE, UNet, noise schedule and a distilled UNet, where there is one, in diffusers' layout."""
    save_part(diffusion.vae, folder / "vae")
    save_part(diffusion.denoiser, folder / diffusion.DENOISER)
    if diffusion.distilled is not None:
        save_part(diffusion.distilled, folder / DISTILLED_FOLDER)
    diffusion.noise_schedule.save_pretrained(folder / "scheduler")


def save_part(part: ModelMixin, folder: Path) -> None:
    """Write a VAE or a UNet as float16; it stays float32 here."""
    part.half().save_pretrained(folder)
    part.float()
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.pop("_name_or_path", None)  # the folder that it was loaded from on this machine
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _halve(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def _name_base(path: Path, base_id: str) -> None:
    """The base model by its id: PEFT writes the folder that it was loaded from on this machine."""
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base_id}
    path.write_text(json.dumps(values, indent=2) + "\n")
