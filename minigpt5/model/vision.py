"""Picture -> embeddings that the language model reads: a frozen encoder, a Q-Former and a projection.

Families, chosen by `VisionConfig.family`: "eva-clip", the published one (EVA-CLIP ViT-g and BLIP-2's Q-Former, by
transformers' own classes); "tower", any vision tower of transformers with a small Q-Former; "own", what a
vision-language model reads with (vision_language.py); "efficientnet", small enough for a laptop; "none".

Shape letters: N pictures, F encoder features, E encoder width, Q queries, H language-model width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionModel,
    SiglipVisionModel,
)

from minigpt5.config import ModelConfig, VisionConfig
from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.model.image_transforms import fit_read
from minigpt5.model.language import load_base
from minigpt5.model.libraries import load_auto, load_base_config, load_image_processor, load_whole
from minigpt5.model.vision_language import OwnEncoder
from minigpt5.model.weights import load_module

TOWERS: dict[str, Any] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""Classes of model types that hold a vision tower beside others; of any other type it is the whole model."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite0, frozen: pixels -> a grid of features.

    `prepare` takes squares of pixels from 0 to 255, of any one size, to what `forward` takes: (N, 3, image_px,
    image_px).
    """

    FAMILY: ClassVar = "efficientnet"
    MODEL_TYPE: ClassVar = "efficientnet-lite0"
    """How the config of a base model's folder names it."""

    def __init__(self, config: VisionConfig | None = None) -> None:
        super().__init__()
        self.image_px = config.image_px if config else VisionConfig.image_px
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetEncoder:
        """Always in evaluation mode: its batch statistics are frozen too."""
        return super().train(False)

    def prepare(self, pixels_NCYX: Tensor) -> Tensor:
        return (_resize(pixels_NCYX, self.image_px) - 127) / 128

    @torch.no_grad()
    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """(N, 3, image_px, image_px) -> (N, F, E)."""
        return self.network.extract_features(pixels_NCYX).flatten(2).transpose(1, 2)


class EvaClipEncoder(nn.Module):
    """EVA-CLIP ViT (arXiv 2211.07636) as BLIP-2 uses it: without its last block and final norm, then `ln_vision`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.eva is not None
        self.image_px = config.image_px
        self.network = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=config.encoder_width,
                intermediate_size=config.eva.intermediate,
                num_hidden_layers=config.eva.num_layers,
                num_attention_heads=config.eva.num_heads,
                image_size=config.image_px,
                patch_size=config.eva.patch_px,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
                qkv_bias=True,
            )
        )
        self.network.post_layernorm.eps = 1e-5  # ln_vision is not one of the encoder's own norms
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EvaClipEncoder:
        return super().train(False)

    def prepare(self, pixels_NCYX: Tensor) -> Tensor:
        """Resize squares to `image_px`, then CLIP's mean and spread."""
        pixels_NCYX = _resize(pixels_NCYX, self.image_px)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pixels_NCYX / 255 - mean) / std

    @torch.no_grad()
    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """(N, 3, image_px, image_px) -> (N, F, E)."""
        return self.network(pixels_NCYX).last_hidden_state


class TowerEncoder(nn.Module):
    """Any vision tower of transformers (CLIP, SigLIP, DINOv2), frozen, with its own image processor.

    `forward` gives the last hidden states of the tower, without pooling.
    """

    FAMILY: ClassVar = "tower"

    def __init__(self, folder: str | Path, *, has_weights: bool = True) -> None:
        """Read the tower and its processor from a base model's folder; without `has_weights` the tower lies on the
        meta device. Raises ModelFolderError."""
        super().__init__()
        config = load_base_config(folder)
        kind = config.model_type
        if has_weights:
            tower, unread = TOWERS.get(kind, AutoModel), ("pooler.", "vision_model.head.")
            load = load_whole if kind in TOWERS else load_auto
            self.network = load(tower, folder, may_lack=unread, dtype=torch.float32)
        else:
            with torch.device("meta"):
                self.network = AutoModel.from_config(getattr(config, "vision_config", config))
        if not hasattr(self.network.config, "image_size"):
            raise ModelFolderError(f"{folder} is a {kind} and no vision tower: name a CLIP, SigLIP or DINOv2 model")
        self.processor = load_image_processor(folder)
        self.image_px = self.prepare(torch.zeros(1, 3, 64, 64)).shape[-1]
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TowerEncoder:
        return super().train(False)

    def prepare(self, pixels_NCYX: Tensor) -> Tensor:
        """Pixels from 0 to 255, as the tower's own processor resizes, cuts and scales them."""
        pictures = [picture.byte().permute(1, 2, 0).numpy() for picture in pixels_NCYX.cpu()]
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """(N, 3, height, width) -> (N, F, E)."""
        return self.network(pixel_values=pixels_NCYX).last_hidden_state


def load_tower(folder: Path, *, has_weights: bool = True) -> EfficientNetEncoder | TowerEncoder:
    """The frozen encoder in a base model's folder, of the family that its config names. Without `has_weights` it lies
    on the meta device. Raises ModelFolderError."""
    config = folder / "config.json"
    if not (config.is_file() and json.loads(config.read_text()).get("model_type") == EfficientNetEncoder.MODEL_TYPE):
        return TowerEncoder(folder, has_weights=has_weights)
    with torch.device("cpu" if has_weights else "meta"):
        encoder = EfficientNetEncoder()
    if has_weights:
        load_module(encoder.network, folder / "model.safetensors")
    return encoder


class NoEncoder(nn.Module):
    """The encoder of a model that reads no pictures."""

    image_px = 1

    def prepare(self, pixels_NCYX: Tensor) -> Tensor:
        raise InvalidRequest("prompt", "this model reads no pictures: leave them out, or make one with --vision")


class NoQFormer(nn.Identity):
    """The Q-Former of a model that reads no pictures, or whose encoder gives embeddings; it has no weights."""


class SmallQFormer(nn.Module):
    """Learned queries that attend to the encoder's features (arXiv 2301.12597), then a projection to the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.features = nn.Sequential(
            nn.LayerNorm(vision.encoder_width), nn.Linear(vision.encoder_width, vision.hidden)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, vision.num_features, vision.hidden))
        self.queries = nn.Parameter(torch.randn(1, vision.num_queries, vision.hidden))
        layer = nn.TransformerDecoderLayer(
            vision.hidden,
            vision.num_heads,
            dim_feedforward=4 * vision.hidden,
            dropout=0.0,
            activation="gelu",
            norm_first=True,
            batch_first=True,
        )
        self.layers = nn.TransformerDecoder(layer, vision.num_layers, norm=nn.LayerNorm(vision.hidden))
        self.projection = nn.Linear(vision.hidden, config.hidden)

    def forward(self, features_NFE: Tensor) -> Tensor:
        """(N, F, E) -> (N, Q, H)."""
        memory = self.features(features_NFE) + self.positions
        return self.projection(self.layers(self.queries.expand(len(memory), -1, -1), memory))


class Blip2QFormer(nn.Module):
    """BLIP-2's Q-Former (arXiv 2301.12597, 3.1) without its text branch, then MiniGPT-4's projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        assert vision.eva is not None
        self.queries = nn.Parameter(torch.zeros(1, vision.num_queries, vision.hidden))
        self.layers = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=vision.hidden,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
                intermediate_size=vision.eva.qformer_intermediate,
                cross_attention_frequency=vision.eva.cross_attention_every,
                encoder_hidden_size=vision.encoder_width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                use_qformer_text_input=False,
            )
        )
        self.projection = nn.Linear(vision.hidden, config.hidden)

    def forward(self, features_NFE: Tensor) -> Tensor:
        """(N, F, E) -> (N, Q, H)."""
        queries_NQD = self.queries.expand(len(features_NFE), -1, -1)
        states = self.layers(query_embeds=queries_NQD, encoder_hidden_states=features_NFE).last_hidden_state
        return self.projection(states)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "efficientnet": (EfficientNetEncoder, SmallQFormer),
    "eva-clip": (EvaClipEncoder, Blip2QFormer),
    "tower": (None, SmallQFormer),
    "own": (None, lambda config: NoQFormer()),
    "none": (lambda vision: NoEncoder(), lambda config: NoQFormer()),
}


class Vision(nn.Module):
    """The whole path: its encoder and Q-Former are those of the config's family, with weights still to be loaded."""

    def __init__(self, config: ModelConfig, encoder: nn.Module | None = None) -> None:
        """`encoder`: one with its weights; without, one of the config's family is made, for weights to be loaded."""
        super().__init__()
        new_encoder, new_qformer = FAMILIES[config.vision.family]
        self.encoder: Any = encoder or new_encoder(config.vision)
        self.qformer: Any = new_qformer(config)

    @classmethod
    def from_encoder(cls, config: ModelConfig, folder: Path) -> Vision:
        """Read the frozen encoder from `folder`; the Q-Former is fresh. Raises ModelFolderError."""
        if config.vision.family == "tower":
            return cls(config, TowerEncoder(folder))
        if config.vision.family == "own":
            return cls.from_base(config, load_base(folder), folder)
        vision = cls(config)
        load_module(vision.encoder.network, folder / "model.safetensors")
        return vision

    @classmethod
    def from_base(cls, config: ModelConfig, base: Any, folder: Path) -> Vision:
        """Take a vision-language model's tower and projector out of transformers' own model, which `load_base` has
        read from `folder`, and leave the text half to others. Raises ModelFolderError."""
        encoder = OwnEncoder(base, folder, image_px=config.vision.image_px)
        encoder.drop_text_half()
        return cls(config, encoder)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Squares of pixels, uint8 (side, side, 3), each of any size -> (N, Q, H)."""
        return self.qformer(self.encode(pictures))

    def encode(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Squares of pixels, uint8 (side, side, 3), each of any size -> the frozen encoder's features: (N, F, E)."""
        squares = [torch.tensor(one).permute(2, 0, 1)[None].float() for one in pictures]
        prepared = torch.cat([self.encoder.prepare(one_1CYX) for one_1CYX in squares])
        if len(pictures) > 1 and prepared.dim() == 4:  # a batch is faster in this layout, which gives other last bits
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        return self.encoder(prepared.to(self.device))

    def embed_features(self, features_NFE: np.ndarray) -> Tensor:
        """What the encoder made of pictures -> (N, Q, H)."""
        return self.qformer(torch.as_tensor(features_NFE).float().to(self.device))

    @torch.no_grad()
    def read(self, pictures: Sequence[bytes]) -> Tensor:
        """Picture files, each of any size -> (N, Q, H). Raises BadPicture."""
        return self([fit_read(data, self.encoder.image_px) for data in pictures])


def _resize(pixels_NCYX: Tensor, px: int) -> Tensor:
    return nn.functional.interpolate(pixels_NCYX, (px, px), mode="bilinear", antialias=True)
