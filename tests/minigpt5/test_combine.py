"""What a dry run counts from config files is what the base models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from examples.own_model.packaged_bases import STORYBOOK, make_diffusion_base
from examples.own_model.tiny_bases import make_stable_diffusion, make_tokenizer
from minigpt5 import new
from minigpt5.combine import combine, sketch
from minigpt5.footprint import count_parts, report
from minigpt5.model.base_models import resolve
from minigpt5.model.folder import load_vision
from minigpt5.model.folder_config import load_config
from minigpt5.model.text_encoder import load_text_encoder
from tests.helpers.pipelines import flux, stable_diffusion_3
from tests.helpers.tiny_vision_language import IMAGE_PX, MAKERS, make_vision_language

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
EXPERTS = {
    "Qwen 3 MoE": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt-oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stable-diffusion")
    make_stable_diffusion(folder)
    return str(folder)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_a_dry_run_counts_experts(name: str, diffusion: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(EXPERTS[name]).save_pretrained(tmp_path)
    bases = {"language": str(tmp_path), "diffusion": diffusion}
    assert report(sketch(**bases)) == report(combine(**bases))


@pytest.mark.parametrize(("maker", "guides_in_one_call"), [(flux, True), (stable_diffusion_3, False)])
def test_a_model_says_whether_it_guides_in_one_call(maker: Any, guides_in_one_call: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "language")
    AutoModelForCausalLM.from_config(EXPERTS["Qwen 3 MoE"]).save_pretrained(tmp_path / "language")
    maker.make(tmp_path / "diffusion", **next(iter(maker.VARIANTS.values())))
    config = combine(language=str(tmp_path / "language"), diffusion=str(tmp_path / "diffusion")).config
    assert config.guides_in_one_call is guides_in_one_call


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_dry_run_counts_a_vision_language_model(kind: str, diffusion: str, tmp_path: Path) -> None:
    make_vision_language(kind, tmp_path / "base")
    bases = {"language": str(tmp_path / "base"), "diffusion": diffusion}
    drawn = sketch(**bases, image_px=IMAGE_PX[kind])
    assert report(drawn) == report(combine(**bases, image_px=IMAGE_PX[kind]))
    assert count_parts(drawn)["vision encoder"] > 0
    assert drawn.config.vision.image_px == IMAGE_PX[kind]
    assert count_parts(sketch(**bases, vision="none"))["vision encoder"] == 0


def test_a_dry_run_refuses_a_size_that_cannot_be_read(
    diffusion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_vision_language("qwen2_5_vl", tmp_path / "base")
    capsys.readouterr()
    options = ["--language", str(tmp_path / "base"), "--diffusion", diffusion, "--image-px", "7", "--dry-run"]
    assert new.main(options) == 1
    error = capsys.readouterr().err
    assert "image_px is 7 but" in error and error.count("\n") == 1


def test_bases_that_packages_carry_become_a_model(tmp_path: Path) -> None:
    """EfficientNet reads pictures, and MiniLM lies in the place of a text encoder, with its tokenizer beside it."""
    base = make_diffusion_base(tmp_path / "diffusion")
    make_tokenizer(tmp_path / "language")
    AutoModelForCausalLM.from_config(EXPERTS["Qwen 3 MoE"]).save_pretrained(tmp_path / "language")
    bases = {"language": str(tmp_path / "language"), "diffusion": str(base), "vision": "efficientnet-lite0"}
    parts = combine(**bases, condition_length=32)
    assert report(sketch(**bases, condition_length=32)) == report(parts)
    assert parts.config.vision.family == "efficientnet"
    shipped = load_config(STORYBOOK)
    own = load_vision(STORYBOOK, shipped)
    picture = np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)
    assert torch.equal(parts.vision.encode([picture]), own.encode([picture]))
    expected = load_text_encoder(resolve(shipped.text_encoder), shipped)(["a red fox", ""])
    assert torch.equal(parts.text_encoder(["a red fox", ""]), expected)
