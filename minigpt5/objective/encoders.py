"""The encoders of stored rows: batch_jobs/precompute.py notes them, and training compares them with its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt5.config import ModelConfig
from minigpt5.model.cache import hash_weights
from minigpt5.model.folder import QFORMER
from minigpt5.model.locate import find_part

DRAWS_CAPTIONS = ("align", "distill")
"""Stages whose examples are a picture that is drawn and its caption."""


ALL_FIELDS = ("moments", "features")
"""What precompute.py stores of a picture: the VAE's moments, the vision encoder's features."""


def fields_read(stage: str, *, reads_pictures: bool) -> tuple[str, ...]:
    """Which of ALL_FIELDS a stage reads. `reads_pictures`: whether the model does."""
    if stage == "vision":
        return ("features",)
    return ("moments",) if stage in DRAWS_CAPTIONS or not reads_pictures else ALL_FIELDS


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen encoder by its weights, and the side of the pictures that it was given."""

    sha256: str
    image_px: int


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Both encoders of a model. They are the same ones wherever their files lie."""

    vae: Encoder | None
    """None for rows that hold no moments."""
    vision: Encoder | None
    """None for a model that reads no pictures, and for rows that hold no features."""

    def maker_of(self, field: str) -> Encoder | None:
        """The encoder that makes one of ALL_FIELDS."""
        return {"moments": self.vae, "features": self.vision}[field]


def find_encoders(
    folder: Path, config: ModelConfig, *, fields: tuple[str, ...] = ALL_FIELDS, vae_of: Path | None = None
) -> Encoders:
    """The encoders of a model folder that make `fields`; `vae_of` is the folder whose `vae/` replaces its own.

    Weight files are read once, and never loaded. The encoder of a vision-language model is told by the weights of the
    whole model. Raises BaseModelNotFound and ModelFolderError as `find_part` does.
    """
    vae = vision = None
    if "moments" in fields:
        vae_of = vae_of or find_part(folder, config, config.diffusion)
        vae = Encoder(sha256=hash_weights(vae_of / "vae"), image_px=config.image_px)
    if "features" in fields and config.vision.family != "none":
        # Inside a model folder the encoder lies beside the Q-Former, which training changes.
        sha256 = hash_weights(find_part(folder, config, config.vision.encoder), without=Path(QFORMER).name)
        vision = Encoder(sha256=sha256, image_px=config.vision.image_px)
    return Encoders(vae=vae, vision=vision)
