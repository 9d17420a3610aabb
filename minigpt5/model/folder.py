"""The model folder: written by training and `minigpt5.new`, read by everything else. Safetensors and JSON only.

config.json           ModelConfig with the fingerprint
vokens.safetensors    rows of the embedding and the head
vocabulary.safetensors  the base model's own rows, where an imported checkpoint has others
mapper.safetensors    fc, queries, transformer
adapter/              LoRA in PEFT's format, after stage 2
vision/               Q-Former and projection; the frozen encoder, where it is no base model
decoder/              vae/, unet/, scheduler/ in diffusers' layout; unet_distilled/, where there is one; or a base model
adapters/<name>/      style adapters of the denoiser, in diffusers' format; the fingerprint does not cover them
examples/1.webp       a picture for the first of the config's examples, where somebody has put one there

Other parts are base models, which `config.json` names by path or hub id. They are read and never written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt5.codec import from_json, to_json
from minigpt5.config import BaseHash, ModelConfig
from minigpt5.errors import BaseModelNotFound, ModelFolderError
from minigpt5.model.base_models import is_hub_id, pin, resolve
from minigpt5.model.cache import hash_file, hash_weights, keep_in_cache
from minigpt5.model.weights import load_module, save_module
from minigpt5.types import DISTILLED, DISTILLED_FOLDER, STYLE_FILE, DrawSettings, Precision

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from pyarrow.fs import FileSystem
    from transformers import PreTrainedTokenizerBase

    from minigpt5.model.decoders.diffusion import Diffusion
    from minigpt5.model.language import LanguageModel
    from minigpt5.model.mapper import Mapper
    from minigpt5.model.prompt import Template
    from minigpt5.model.vision import Vision

DISTILLED_DRAW = DrawSettings(steps=4, guidance_scale=1.0, scheduler=DISTILLED)
DECODER = "decoder"
STYLES = "adapters"
"""Folder of the style adapters, each in a folder of its name."""
STYLE_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
QFORMER = "vision/qformer.safetensors"
VOCABULARY = "vocabulary.safetensors"
COPIED_BYTES = 2**24
"""Bytes of a fetched file that are held at once."""
FINGERPRINT = re.compile("[0-9a-f]{64}")
MAX_EXAMPLE_PICTURE_BYTES = 32 * 1024
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
NOT_COPIED = (*(f"*{suffix}" for suffix in sorted(PICKLES)), "*.fp16.*")
"""Files beside the weights of a decoder that a model folder must not or need not have."""


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
        config = from_json(ModelConfig, json.loads(path.read_bytes()))
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged ({error}): correct it or restore the folder") from error
    return dataclasses.replace(config, styles=list_styles(folder))


def list_styles(folder: str | Path) -> tuple[str, ...]:
    """Names of the folder's style adapters, sorted. Raises ModelFolderError where a name is not plain."""
    names = sorted(path.parent.name for path in (Path(folder) / STYLES).glob(f"*/{STYLE_FILE}"))
    for name in names:
        if not STYLE_NAME.fullmatch(name):
            raise ModelFolderError(
                f"{folder}/{STYLES} has a style {name[:80]!r} but a name must be at most 64 letters, digits, - and _: "
                "rename the folder"
            )
    return tuple(names)


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


def compute_fingerprint(folder: str | Path, bases: Sequence[BaseHash] = ()) -> str:
    """SHA-256 over every weight file's path and content, in order of path, and over the hashes of base models. Style
    adapters are left out. A large file that has not changed is not read again: see `hash_file`."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if path.is_relative_to(folder / STYLES):  # vokens are the same with and without
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(hash_file(path)))
    for base in bases:  # without their ids: a base may lie elsewhere on another machine
        digest.update(f"{base.sha256}\n".encode())
    return digest.hexdigest()


def check_folder(folder: str | Path) -> ModelConfig:
    """The config of a folder whose weights are those it was saved with. Raises ModelFolderError."""
    folder = Path(folder)
    config = load_config(folder)
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise ModelFolderError(f"{folder} holds pickled files ({', '.join(pickles)}): convert them to safetensors")
    found = compute_fingerprint(folder, config.bases)
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


def locate(model: str | Path) -> Path:
    """A model folder by its path, its URI or its hub id (owner/name, owner/name@revision), as a folder of this machine.

    What is not here is fetched once, into the user's cache, by one process at a time. Raises ModelFolderError.
    """
    name = str(model)
    if "://" in name:
        return fetch_folder(name)
    path = Path(name).expanduser().absolute()
    if path.is_dir() or not is_hub_id(name):
        return path
    try:
        return resolve(name)
    except BaseModelNotFound as error:
        raise ModelFolderError(f"there is no model folder {path}, and no model {name} on the hub: {error}") from None


def shared_name(model: str | Path) -> str:
    """The name by which every machine of a cluster can `locate` the same model: a path is made absolute, and a hub id
    gets its revision. Raises ModelFolderError."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        return str(path)
    return pin(str(model), locate(model)) if is_hub_id(str(model)) else str(model)


def fetch_folder(uri: str) -> Path:
    """The model folder at a URI, copied into the cache under its fingerprint. Raises ModelFolderError."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        files, path = _open_uri(uri.rstrip("/"))
        if files.type_name == "local":
            return Path(path)
        with files.open_input_stream(f"{path}/config.json", compression=None) as stream:
            raw = stream.read()
        config = from_json(ModelConfig, json.loads(raw))
        if not FINGERPRINT.fullmatch(config.fingerprint):
            raise ValueError(f"its fingerprint is {config.fingerprint[:80]!r}")

        def fill(target: Path) -> None:
            for info in files.get_file_info(fs.FileSelector(path, recursive=True)):
                place = target / info.path[len(path) :].lstrip("/")
                if not info.is_file or place.suffix in PICKLES:
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                with files.open_input_stream(info.path, compression=None) as stream, place.open("wb") as file:
                    shutil.copyfileobj(stream, file, COPIED_BYTES)
            check_folder(target)  # it may be written at this moment

        # A changed config, which the fingerprint does not hold, is another folder.
        return keep_in_cache(f"models/{config.fingerprint}-{hashlib.sha256(raw).hexdigest()[:12]}", fill)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ModelFolderError(f"{uri} cannot be read as a model folder: {error}") from error


def _open_uri(uri: str) -> tuple[FileSystem, str]:
    from pyarrow import fs

    return fs.FileSystem.from_uri(uri)


def find_part(folder: str | Path, config: ModelConfig, name: str) -> Path:
    """The folder of a part that a config names: inside the model folder, else a base model.

    Raises BaseModelNotFound, and ModelFolderError where the base model is not the one that the folder was made with.
    """
    if contains(folder, name):
        return Path(folder) / name
    found = resolve(name)
    if config.bases and name not in {base.id for base in config.bases}:
        raise ModelFolderError(f"{name} is not among the bases of {folder}/config.json: correct its id there too")
    for base in config.bases:
        if base.id == name and (digest := hash_weights(found)) != base.sha256:
            raise ModelFolderError(
                f"the weights of base model {name} have the hash {digest[:12]} but {folder} was made with "
                f"{base.sha256[:12]}: name the revision that it was made with, as in owner/name@revision"
            )
    return found


def contains(folder: str | Path, name: str) -> bool:
    """Tell whether a part is inside a model folder, and no base model."""
    local = Path(folder) / name
    return bool(name) and local.is_dir() and local.resolve().is_relative_to(Path(folder).resolve())


def check_bases(folder: str | Path, config: ModelConfig) -> None:
    """Find all base models that writing and drawing need. Raises as `find_part` does."""
    for name in (config.language_model, config.vision.encoder, config.diffusion):
        if name:
            find_part(folder, config, name)


def load_generator_model(
    folder: str | Path, *, device: str = "cpu", precision: Precision | None = None
) -> tuple[ModelConfig, PreTrainedTokenizerBase, LanguageModel, Vision]:
    """What writes, ready to: config, tokenizer, language model with rows and merged adapter, vision path.

    `precision` of the language model: by default float32 on a CPU, and bfloat16 on a GPU, in half the memory.
    """
    import torch

    from minigpt5.model.language import load_tokenizer

    folder = locate(folder)
    config = check_folder(folder)
    language, vision = load_language_and_vision(folder, config)
    is_on_cpu = torch.device(device).type == "cpu"
    if (precision or ("float32" if is_on_cpu else "bfloat16")) == "bfloat16":
        for parameter in language.parameters():  # and no buffer: rotary frequencies need float32
            parameter.data = parameter.data.to(torch.bfloat16)
    language.to(device).pack()
    return config, load_tokenizer(find_part(folder, config, config.language_model), config), language, vision.to(device)


def load_decoder_model(
    folder: str | Path, *, device: str = "cpu", precision: Precision | None = None
) -> tuple[ModelConfig, Mapper, Diffusion]:
    """What draws, ready to: config, mapper, diffusion model. docs/batch-invariance.md says how far a picture
    depends on its batch: on a CPU, layers of a UNet are mended, and those of a transformer are not.

    `precision` of the diffusion model: by default float32 on a CPU, and bfloat16 on a GPU, in half the memory.
    """
    import torch

    from minigpt5.model.batch_invariance import make_batch_invariant, mend_denoiser
    from minigpt5.model.decoders.load import load_diffusion
    from minigpt5.model.decoders.styles import Styles

    folder = locate(folder)
    config = check_folder(folder)
    mapper = load_mapper(folder, config)
    diffusion = load_diffusion(find_part(folder, config, config.diffusion))
    is_on_cpu = torch.device(device).type == "cpu"
    if is_on_cpu:  # what is mended there is oneDNN's
        make_batch_invariant(diffusion)
    diffusion.hold_in(getattr(torch, precision or ("float32" if is_on_cpu else "bfloat16")))
    diffusion.styles = Styles(
        diffusion.denoiser,
        folder / STYLES,
        pipeline=diffusion.PIPELINES[0],
        prefix=diffusion.DENOISER,
        mend=mend_denoiser if is_on_cpu else lambda denoiser: None,
    )
    return config, mapper.to(device), diffusion.to(device)


Adapter = Literal["merged", "frozen", "trained"]
"""Where an adapter goes: into the weights, beside them, or beside them to be trained on."""


def load_language_and_vision(
    folder: Path, config: ModelConfig, *, adapter: Adapter = "merged"
) -> tuple[LanguageModel, Vision]:
    """All that reads and writes. A vision-language model, which is both, is read once."""
    if config.vision.family != "own":
        return load_language(folder, config, adapter=adapter), load_vision(folder, config)
    from minigpt5.model.language import load_base
    from minigpt5.model.vision import Vision

    found = find_part(folder, config, config.language_model)
    base = load_base(found)
    language = load_language(folder, config, adapter=adapter, base=base)
    return language, Vision.from_base(config, base, found)


def load_language(folder: Path, config: ModelConfig, *, adapter: Adapter = "merged", base: Any = None) -> LanguageModel:
    """The language model with its rows and its adapter, where it has one. `base`: transformers' own model, where it has
    been read already."""
    from safetensors.torch import load_file

    from minigpt5.model.language import LanguageModel, load_base

    found = find_part(folder, config, config.language_model)
    language = LanguageModel.from_causal(base or load_base(found), config, found)
    if (vocabulary := folder / VOCABULARY).is_file():
        rows = load_file(vocabulary)
        language.replace_vocabulary(rows["embedding"], rows["head"])
    load_module(language.voken_embeddings, folder / "vokens.safetensors")
    if (folder / "adapter").is_dir():
        language.load_adapter(folder / "adapter", is_trained=adapter == "trained")
        if adapter == "merged":
            language.merge_adapter()
    return language


def load_template(folder: str | Path) -> Template:
    """The template of a model folder, without its weights. Raises as `find_part` does."""
    from minigpt5.model.language import load_tokenizer
    from minigpt5.model.published_template import PUBLISHED
    from minigpt5.model.template import make_template

    config = load_config(folder)
    if config.template == "published":
        return PUBLISHED
    return make_template(config, load_tokenizer(find_part(folder, config, config.language_model), config))


def load_mapper(folder: Path, config: ModelConfig) -> Mapper:
    from minigpt5.model.mapper import Mapper

    mapper = Mapper(config)
    load_module(mapper, folder / "mapper.safetensors")
    return mapper


def load_vision(folder: Path, config: ModelConfig) -> Vision:
    """The vision path of a model folder: its frozen encoder, from the folder or a base model, and its Q-Former."""
    vision = new_vision(config, folder=folder)
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
    save_module(language.voken_embeddings, folder / "vokens.safetensors")
    save_module(mapper, folder / "mapper.safetensors")
    if config.vision.has_qformer:
        save_module(vision.qformer, folder / QFORMER)
    if hasattr(language.body, "peft_config"):
        language.body.save_pretrained(str(folder / "adapter"))
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        _name_base(folder / "adapter" / "adapter_config.json", config.language_model)
        _halve(folder / "adapter" / "adapter_model.safetensors")
    if start and (start / VOCABULARY).is_file():
        shutil.copyfile(start / VOCABULARY, folder / VOCABULARY)
    if start and contains(start, config.vision.encoder):
        ignored = shutil.ignore_patterns(*NOT_COPIED, Path(QFORMER).name)
        shutil.copytree(
            start / config.vision.encoder, folder / config.vision.encoder, ignore=ignored, dirs_exist_ok=True
        )
    if decoder:
        config = dataclasses.replace(config, diffusion=DECODER)
        for part, source in decoder.items():
            if (source / part).is_file():
                shutil.copyfile(source / part, folder / DECODER / part)
            else:
                shutil.copytree(source / part, folder / DECODER / part, ignore=shutil.ignore_patterns(*NOT_COPIED))
    elif start and contains(start, config.diffusion):
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(start / config.diffusion, folder / config.diffusion, ignore=ignored)
    if start and not decoder and (start / STYLES).is_dir():  # another decoder has other layers
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(start / STYLES, folder / STYLES, ignore=ignored, dirs_exist_ok=True)
    return write_config(folder, config)


def write_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """Write `config.json` with the fingerprint of what is in the folder, and return the config."""
    config = dataclasses.replace(config, fingerprint=compute_fingerprint(folder, config.bases))
    values = to_json(config)
    del values["styles"]  # the folder's own
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return dataclasses.replace(config, styles=list_styles(folder))


def draws_with(config: ModelConfig, diffusion: Diffusion) -> ModelConfig:
    """The config with or without defaults of a distilled UNet, as there is one."""
    distilled = None if diffusion.distilled is None else config.draw_distilled or DISTILLED_DRAW
    return dataclasses.replace(config, draw_distilled=distilled)


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
