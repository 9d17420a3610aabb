"""A tiny random Stable Diffusion 1.x or 2.x in diffusers' layout."""

from __future__ import annotations

from typing import Any

from examples.own_model.tiny_bases import make_stable_diffusion

VARIANTS: dict[str, dict[str, Any]] = {"noise": {}, "velocity": {"prediction_type": "v_prediction"}}

make = make_stable_diffusion
