"""Texts with pictures and pictures with pictures, by a CLIP model: CLIP-I, CLIP-T, MM-Relevance and the published
"CLIP F1".

CLIP's weights come from a folder or from a hub id. The published figures are of ViT-L/14, and of ViT-B/32 on MMDialog.

Shape letters: B texts or pictures, D the common embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.evaluation.perceptual import Lpips
from minigpt5.evaluation.text import check_pairs
from minigpt5.model.base_models import resolve
from minigpt5.model.libraries import load_base_config, load_base_tokenizer, load_whole
from minigpt5.model.pixels import to_tensor

Part = str | np.ndarray
"""A part of a reply: a text, or a picture (Y, X, 3) uint8."""
GILL_PX = 256
"""Side at which GILL compares pictures by LPIPS."""


class Clip:
    """A CLIP model of transformers with its own processor."""

    def __init__(self, folder: str, *, batch_size: int = 16, device: str = "cpu") -> None:
        """`folder`: a folder with CLIP's safetensors weights, or a hub id. Raises BaseModelNotFound,
        ModelFolderError."""
        from transformers import CLIPImageProcessorPil, CLIPModel

        path = resolve(folder)
        if (kind := load_base_config(path).model_type) != "clip":
            raise ModelFolderError(
                f"{path} is a {kind} model: give a CLIP model, such as openai/clip-vit-large-patch14"
            )
        model: Any = load_whole(CLIPModel, path, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer: Any = load_base_tokenizer(path)
        self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(path)  # the other one needs torchvision
        self.batch_size = batch_size

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies a cosine by: 100 in the published models."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut to what CLIP reads -> (B, D), each of length 1."""
        longest = self.model.config.text_config.max_position_embeddings
        batches = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            batches.append(self.model.text_projection(states.pooler_output))
        return torch.nn.functional.normalize(torch.cat(batches), dim=-1)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures (Y, X, 3) uint8 of any sizes -> (B, D), each of length 1."""
        batches = []
        for start in range(0, len(pictures), self.batch_size):
            batch = [Image.fromarray(one) for one in pictures[start : start + self.batch_size]]
            pixels_BCYX = self.image_processor(batch, return_tensors="pt")["pixel_values"].to(self.model.device)
            batches.append(self.model.visual_projection(self.model.vision_model(pixels_BCYX).pooler_output))
        return torch.nn.functional.normalize(torch.cat(batches), dim=-1)

    def embed(self, part: Part) -> Tensor:
        """A text or a picture -> (D,)."""
        return self.embed_texts([part])[0] if isinstance(part, str) else self.embed_pictures([part])[0]


def clip_i(drawn: Sequence[np.ndarray], true: Sequence[np.ndarray], clip: Clip) -> np.ndarray:
    """CLIP-I: the cosine of each drawn picture with the true one, (B,), as published: not times 100, not cut at 0."""
    check_pairs(drawn, true)
    return (clip.embed_pictures(drawn) * clip.embed_pictures(true)).sum(-1).double().cpu().numpy()


def clip_t(drawn: Sequence[np.ndarray], captions: Sequence[str], clip: Clip) -> np.ndarray:
    """CLIP-T: the cosine of each drawn picture with its caption, (B,), as published."""
    check_pairs(drawn, captions)
    return (clip.embed_pictures(drawn) * clip.embed_texts(captions)).sum(-1).double().cpu().numpy()


def clip_score(cosines: np.ndarray) -> float:
    """CLIPScore as torchmetrics defines it, from `clip_i` or `clip_t`: 100 times the mean cosine, at least 0."""
    return max(100 * float(cosines.mean()), 0.0)


def mm_relevance(reply: Sequence[Part], reference: Sequence[Part], clip: Clip) -> list[float]:
    """MM-Relevance's scores, as MMDialog's compute_mmrel.py pairs: the first part with the first one, and so on, a text
    with a picture too. Parts beyond the shorter of the two have no score. Cosine times CLIP's logit scale."""
    return [
        float(clip.embed(one) @ clip.embed(other)) * clip.logit_scale
        for one, other in zip(reply, reference, strict=False)
    ]


class Turn(NamedTuple):
    """A turn of a dialogue: its text, "" for none, and its picture."""

    text: str
    picture: np.ndarray | None = None


def clip_f1_published(replies: Sequence[Turn], references: Sequence[Turn], clip: Clip) -> float:
    """The "CLIP F1" of one dialogue, as MiniGPT-5's metric.py computes it under the name of MM-Relevance.

    Text goes with text and picture with picture, turn by turn. The sum of their cosines, over the predicted items, is
    the precision, and over the true items the recall. The published figure is the mean over dialogues, of ViT-B/32.
    """
    check_pairs(replies, references)
    cosines, num_predicted, num_true = [], 0, 0
    for reply, reference in zip(replies, references, strict=True):
        for one, other in ((reply.text, reference.text), (reply.picture, reference.picture)):
            is_predicted, is_true = (part is not None and len(part) > 0 for part in (one, other))
            num_predicted += is_predicted
            num_true += is_true
            if is_predicted and is_true:
                assert one is not None and other is not None
                cosines.append(float(clip.embed(one) @ clip.embed(other)))
    total = sum(cosines)
    if not total:
        return 0.0
    precision, recall = total / num_predicted, total / num_true
    return 2 * precision * recall / (precision + recall)


def gill_vist(
    drawn: Sequence[np.ndarray], true: Sequence[np.ndarray], clip: Clip | None, lpips: Lpips | None
) -> dict[str, float]:
    """Score GILL's VIST protocol: of each story the *last* picture alone, drawn from five captions and four pictures.

    Returns the means of CLIP-I and of LPIPS (AlexNet, both at 256 px); None leaves a metric out.
    """
    check_pairs(drawn, true)
    scores = {}
    if clip:
        scores["clip_i"] = float(clip_i(drawn, true, clip).mean())
    if lpips:
        pairs = zip(drawn, true, strict=True)
        scores["lpips"] = float(np.mean([float(lpips(_resized(one), _resized(other))) for one, other in pairs]))
    return scores


def _resized(picture: np.ndarray) -> Tensor:
    """(Y, X, 3) uint8 -> (1, 3, 256, 256) in [-1, 1]."""
    return torch.nn.functional.interpolate(
        to_tensor(picture[None]), size=(GILL_PX, GILL_PX), mode="bilinear", antialias=True
    )
