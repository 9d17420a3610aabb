"""The model folder: written by training, read by everything else. Safetensors and JSON only.

config.json           ModelConfig with the fingerprint
vokens.safetensors    rows of the embedding and the head
vocabulary.safetensors  the base model's own rows, where an imported checkpoint has others
mapper.safetensors    fc, queries, transformer
adapter/              LoRA in PEFT's format, after stage 2
vision/               Q-Former and projection
decoder/              vae/, unet/, scheduler/ in diffusers' layout; unet_distilled/, where there is one
examples/1.webp       a picture for the first of the config's examples, where somebody has put one there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5.codec import from_json, to_json
from minigpt5.config import ModelConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model.base_models import resolve
from minigpt5.types import DISTILLED, DrawSettings

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from minigpt5.model.diffusion import Diffusion
    from minigpt5.model.language import LanguageModel
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.vision import Vision

DISTILLED_DRAW = DrawSettings(steps=4, guidance_scale=1.0, scheduler=DISTILLED)
MAX_EXAMPLE_PICTURE_BYTES = 32 * 1024
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def load_config(folder: str | Path) -> ModelConfig:
    """Read and check `config.json`; the weights are not touched. Raises ModelFolderError."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(
            f"{folder} is not a model folder: it has no config.json; name one that training wrote, "
            "on a cluster one that every node has"
        )
    try:
        return from_json(ModelConfig, json.loads(path.read_bytes()))
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged ({error}): correct it or restore the folder") from error


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


def compute_fingerprint(folder: str | Path) -> str:
    """SHA-256 over every weight file's path and content, in order of path."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_folder(folder: str | Path) -> ModelConfig:
    """The config of a folder whose weights are those it was saved with. Raises ModelFolderError."""
    folder = Path(folder)
    config = load_config(folder)
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise ModelFolderError(f"{folder} holds pickled files ({', '.join(pickles)}): convert them to safetensors")
    found = compute_fingerprint(folder)
    if found != config.fingerprint:
        raise ModelFolderError(
            f"the weights in {folder} have fingerprint {found[:12]} but config.json says "
            f"{config.fingerprint[:12] or '(none)'}: a file is damaged, missing or foreign; restore the folder"
        )
    return config


def default_device() -> str:
    """The GPU that this process sees, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_generator_model(
    folder: str | Path, *, device: str = "cpu"
) -> tuple[ModelConfig, PreTrainedTokenizerBase, LanguageModel, Vision]:
    """What writes, ready to: config, tokenizer, language model with rows and merged adapter, vision path."""
    from minigpt5.model.language import load_tokenizer

    folder = Path(folder)
    config = check_folder(folder)
    vision = load_vision(folder, config)
    load_qformer(folder, vision)
    language = load_language(folder, config).to(device)
    language.pack()
    return config, load_tokenizer(resolve(config.language_model), config), language, vision.to(device)


def load_decoder_model(folder: str | Path) -> tuple[ModelConfig, Mapper, Diffusion]:
    """What draws, ready to: config, mapper, diffusion model."""
    from minigpt5.model.batch_invariance import make_batch_invariant
    from minigpt5.model.diffusion import Diffusion

    folder = Path(folder)
    config = check_folder(folder)
    mapper = load_mapper(folder, config)
    diffusion = Diffusion.from_pretrained(find_decoder(folder, config))
    make_batch_invariant(diffusion)
    return config, mapper, diffusion


def find_decoder(folder: str | Path, config: ModelConfig) -> Path:
    """The VAE, UNet and noise schedule of a model folder: its own, or a base model's. Raises BaseModelNotFound."""
    local = Path(folder) / config.diffusion
    return local if local.is_dir() else resolve(config.diffusion)


def load_language(folder: Path, config: ModelConfig) -> LanguageModel:
    """The language model with its rows and its adapter, merged."""
    from safetensors.torch import load_file
    from transformers.utils import logging

    from minigpt5.model.language import LanguageModel

    logging.disable_progress_bar()  # loading takes a moment; a bar in every server log says nothing
    language = LanguageModel.from_base(resolve(config.language_model), config)
    if (vocabulary := folder / "vocabulary.safetensors").is_file():
        rows = load_file(vocabulary)
        language.replace_vocabulary(rows["embedding"], rows["head"])
    load_voken_embeddings(folder, language)
    if (folder / "adapter").is_dir():
        language.load_adapter(folder / "adapter")
        language.merge_adapter()
    return language


def load_mapper(folder: Path, config: ModelConfig) -> Mapper:
    from minigpt5.model.mapper import Mapper

    mapper = Mapper(config)
    load_module(mapper, folder / "mapper.safetensors")
    return mapper


def load_voken_embeddings(folder: Path, language: LanguageModel) -> None:
    load_module(language.voken_embeddings, folder / "vokens.safetensors")


def load_qformer(folder: Path, vision: Vision) -> None:
    load_module(vision.qformer, folder / "vision" / "qformer.safetensors")


def load_vision(folder: Path | None, config: ModelConfig) -> Vision:
    """The vision path with its frozen encoder, from `folder` or a base model, and a fresh Q-Former."""
    from minigpt5.model.vision import Vision

    vision = Vision(config)
    local = folder / config.vision.encoder if folder else None
    source = local if local and local.is_dir() else resolve(config.vision.encoder)
    load_module(vision.encoder.network, source / "model.safetensors")
    return vision


def save(
    folder: str | Path,
    config: ModelConfig,
    *,
    language: LanguageModel,
    mapper: Mapper,
    vision: Vision,
    diffusion: Diffusion,
) -> ModelConfig:
    """Write everything that was trained, as float16; returns the config with its fingerprint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_module(language.voken_embeddings, folder / "vokens.safetensors")
    save_module(mapper, folder / "mapper.safetensors")
    save_module(vision.qformer, folder / "vision" / "qformer.safetensors")
    if hasattr(language.body, "peft_config"):
        language.body.save_pretrained(str(folder / "adapter"))
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        _name_base(folder / "adapter" / "adapter_config.json", config.language_model)
        _halve(folder / "adapter" / "adapter_model.safetensors")
    save_diffusion(diffusion, folder / config.diffusion)
    config = dataclasses.replace(draws_with(config, diffusion), fingerprint=compute_fingerprint(folder))
    (folder / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")
    return config


def draws_with(config: ModelConfig, diffusion: Diffusion) -> ModelConfig:
    """The config with or without defaults of a distilled UNet, as there is one."""
    distilled = None if diffusion.distilled is None else config.draw_distilled or DISTILLED_DRAW
    return dataclasses.replace(config, draw_distilled=distilled)


def save_diffusion(diffusion: Diffusion, folder: Path) -> None:
    """Write VAE, UNet, noise schedule and a distilled UNet, where there is one, in diffusers' layout."""
    from minigpt5.model.diffusion import DISTILLED_FOLDER

    save_part(diffusion.vae, folder / "vae")
    save_part(diffusion.unet, folder / "unet")
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


def load_module(module: nn.Module, path: Path) -> None:
    """Fill a module from a file that must hold exactly its tensors. Raises ModelFolderError."""
    import safetensors
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): restore the model folder") from error
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))[:4]
        raise ModelFolderError(f"{path} does not fit config.json: {different}; restore the model folder")
    module.load_state_dict({name: value.float() for name, value in weights.items()})


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's tensors as float16."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in module.state_dict().items()}, path)


def _halve(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def _name_base(path: Path, base_id: str) -> None:
    """The base model by its id: PEFT writes the folder that it was loaded from on this machine."""
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base_id}
    path.write_text(json.dumps(values, indent=2) + "\n")
