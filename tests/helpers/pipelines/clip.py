"""Tiny CLIP text encoders."""

from __future__ import annotations

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from examples.own_model.tiny_bases import clip_text_config


def make_clip_text(*, hidden: int = 32, projection: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    """`projection`: the width of the pooled vector, of a model that has one."""
    if not projection:
        return CLIPTextModel(clip_text_config(hidden_size=hidden)).eval()
    return CLIPTextModelWithProjection(clip_text_config(hidden_size=hidden, projection_dim=projection)).eval()
