"""The language model as a folder that vLLM reads: `python -m minigpt5.engine.vllm.export MODEL FOLDER`.

The adapter is merged, and the rows of the vokens and the placeholder stand after the base's own in embedding and head.
Beside transformers' files lies `minigpt5/`: what the backend needs to make vokens of vLLM's states (the final norm),
and the states of one prompt as the torch engine computes them in float32, with which every start is compared.

Shape letters: T vocabulary, H hidden width, V vokens of a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.engine.vllm.exported import Export, Exported, FinalNorm, NormKind
from minigpt5.engine.vllm.settings import Dtype
from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.model.folder import PREFIX, load_language
from minigpt5.model.folder_config import check_folder
from minigpt5.model.language import LanguageModel, load_base, load_tokenizer
from minigpt5.model.locate import find_part, locate
from minigpt5.model.prompt import text_ids

CHECK_TEXT = "A fox who finds a red balloon and shows it to an owl in the forest."
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""Names of the last norm in transformers' models."""


@torch.no_grad()
def export(model: str | Path, folder: Path, *, dtype: Dtype = "bfloat16") -> None:
    """Write `folder`, which must be empty or absent. `dtype`: what vLLM will compute in.

    Raises ModelFolderError where the model has what vLLM or this way of exporting lacks.
    """
    source = locate(model)
    config = check_folder(source)
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelFolderError(f"{folder} is not empty: name another folder, or remove what is in it")
    if config.vision.family == "own":
        raise ModelFolderError(
            f"{model} reads pictures with its language model, which is not exported: use engine=torch"
        )
    if (source / PREFIX).is_file():
        raise ModelFolderError(f"{model} has a prefix, which vLLM cannot put before its texts: use engine=torch")
    if config.published_quirks:
        raise ModelFolderError(f"{model} repeats the published code's bugs, which vLLM cannot: use engine=torch")
    base = find_part(source, config, config.language_model)
    tokenizer = load_tokenizer(base, config)
    causal = load_base(base)
    language = load_language(source, config, base=causal)
    ids = [*text_ids(CHECK_TEXT, tokenizer), *language.voken_embeddings.ids[:-1]]
    check_VH = language.states(language.embed(torch.tensor([ids])))[0, -config.num_vokens :]
    norm = read_norm(language)
    about = Exported(
        fingerprint=config.fingerprint,
        dtype=dtype,
        num_layers=language.body.config.num_hidden_layers,
        norm=norm.kind,
        eps=norm.eps,
        check_ids=tuple(ids),
    )
    _widen(causal, language)
    causal.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Export(about=about, norm=norm, check_VH=check_VH.numpy()).save(folder)


@torch.no_grad()
def read_norm(language: LanguageModel) -> FinalNorm:
    """The final norm of a language model, found by its name and tried on random states. Raises ModelFolderError."""
    module: Any = next((found for name in NORMS if (found := getattr(language.body, name, None)) is not None), None)
    kind = type(language.body).__name__
    if module is None:
        raise ModelFolderError(f"no final norm was found in a {kind} ({', '.join(NORMS)}): use engine=torch")
    weight_H = module.weight.float().numpy()
    bias = getattr(module, "bias", None)
    bias_H = np.zeros_like(weight_H) if bias is None else bias.float().numpy()
    eps = float(next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)))
    states_NH = torch.randn(4, len(weight_H), generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected_NH = module(states_NH).numpy()
    for norm_kind in get_args(NormKind):
        for weight in (weight_H, weight_H + 1):  # Gemma's weights are what is added to one
            norm = FinalNorm(kind=norm_kind, eps=eps, weight_H=weight, bias_H=bias_H)
            if np.allclose(norm(states_NH.numpy()), expected_NH, rtol=1e-4, atol=1e-4):
                return norm
    raise ModelFolderError(f"the final norm of a {kind} is neither an RMS norm nor a layer norm: use engine=torch")


def _widen(causal: Any, language: LanguageModel) -> None:
    """Give transformers' own model the rows of the vokens and of the placeholder. Raises ModelFolderError."""
    head, rows = language.head, language.voken_embeddings
    if getattr(head, "bias", None) is not None:
        raise ModelFolderError("the language model's head has a bias, which would be lost: use engine=torch")
    # Some embeddings scale what they look up, and our rows are as they come out.
    scale = float(getattr(language.body.get_input_embeddings(), "embed_scale", 1.0))
    embedding_TH = torch.cat([language.embedding[: rows.first], rows.embedding / scale])
    head_TH = torch.cat([head.weight[: rows.first], rows.head])
    _put(causal.get_input_embeddings(), embedding_TH)
    new_head = nn.Linear(head_TH.shape[1], len(head_TH), bias=False, device="meta")
    new_head.weight = nn.Parameter(head_TH, requires_grad=False)
    causal.set_output_embeddings(new_head)
    causal.config.get_text_config().vocab_size = len(head_TH)
    causal.config.tie_word_embeddings = causal.config.get_text_config().tie_word_embeddings = False


def _put(embedding: nn.Embedding, weight_TH: Tensor) -> None:
    embedding.weight = nn.Parameter(weight_TH, requires_grad=False)
    embedding.num_embeddings = len(weight_TH)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minigpt5.engine.vllm.export", description=__doc__)
    parser.add_argument("model", help="model folder: path, URI or hub id")
    parser.add_argument("folder", type=Path, help="what is made")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="bfloat16", help="of the weights (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        export(options.model, options.folder, dtype=options.dtype)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
