"""ModelConfig: what a model folder says of itself, and the two presets. No torch here: the HTTP front reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from minigpt5.types import DrawSettings, Sampling


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Picture -> embeddings that the language model reads."""

    encoder: str
    """Base-model id of the frozen picture encoder."""
    image_px: int = 224
    encoder_width: int
    """Channels of one of the encoder's features."""
    num_features: int
    """Features of one picture."""
    hidden: int
    """Width of the Q-Former."""
    num_layers: int
    num_heads: int
    num_queries: int = 32


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapter of the language model (arXiv 2106.09685)."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that training and serving must agree on."""

    name: str
    language_model: str
    """Base-model id."""
    hidden: int
    """Width of the language model's hidden states."""
    vocabulary: int
    """Tokens of the base tokenizer: vokens are numbered from here."""
    context_tokens: int
    """Longest sequence, prompt and story together."""
    vision: VisionConfig
    text_encoder: str
    """Base-model id; its states of a caption are the target of the caption loss."""
    diffusion: str = "decoder"
    """Folder of VAE, UNet and scheduler: relative to the model folder, or a base-model id."""
    num_vokens: int = 8
    condition_length: int
    condition_width: int
    mapper_layers: int = 4
    mapper_heads: int = 8
    image_px: int
    """Side of a drawn picture."""
    guidance_rescale: float = 0.0
    """How far the guided prediction is scaled back to the spread of the unguided one (arXiv 2305.08891, 3.4)."""
    lora: LoraConfig
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawSettings = field(default_factory=DrawSettings)
    licences: tuple[str, ...] = ()
    """Of base models and training sets."""
    fingerprint: str = ""
    """Of the weights that make vokens and read them; set when the folder is saved."""


def storybook() -> ModelConfig:
    """The embedded default: small, CPU, drawn from a picture world of its own."""
    return ModelConfig(
        name="storybook",
        language_model="smollm2-135m-instruct",
        hidden=576,
        vocabulary=49152,
        context_tokens=1536,
        vision=VisionConfig(
            encoder="efficientnet-lite0",
            encoder_width=1280,
            num_features=49,
            hidden=256,
            num_layers=4,
            num_heads=4,
        ),
        text_encoder="minilm-l6",
        condition_length=32,
        condition_width=384,
        image_px=128,
        guidance_rescale=0.7,
        lora=LoraConfig(
            rank=16,
            alpha=32,
            dropout=0.0,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        sampling=Sampling(temperature=0.7, top_p=0.9, max_page_tokens=64),
        draw=DrawSettings(steps=20, guidance_scale=3.0, scheduler="ddim"),
        licences=(
            "SmolLM2-135M-Instruct: Apache-2.0",
            "EfficientNet-Lite0: Apache-2.0",
            "all-MiniLM-L6-v2: Apache-2.0",
            "Noto emoji sprites (training pictures): Apache-2.0",
        ),
    )


def to_json(config: ModelConfig) -> dict[str, object]:
    return dataclasses.asdict(config)


def from_json(values: dict[str, object]) -> ModelConfig:
    """The inverse of `to_json`. An unknown or missing key raises TypeError naming it."""
    nested = {"vision": VisionConfig, "lora": LoraConfig, "sampling": Sampling, "draw": DrawSettings}
    filled = {
        key: nested[key](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})  # type: ignore[attr-defined]
        if key in nested
        else value
        for key, value in values.items()
    }
    return ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in filled.items()})  # type: ignore[arg-type]


def default_model_folder() -> Path:
    """The storybook model of the repository that this package is installed from."""
    return Path(__file__).resolve().parent.parent / "models" / "storybook"
