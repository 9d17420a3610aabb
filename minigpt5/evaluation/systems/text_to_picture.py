"""Text -> picture by a diffusion model's own text encoder: what rivals without vokens draw with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minigpt5.config import ModelConfig
from minigpt5.engine.denoising import denoise
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.folder import default_device, load_decoder_model
from minigpt5.model.locate import find_part
from minigpt5.model.pixels import to_pixels
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.story.stream import page_seed
from minigpt5.types import DrawSettings

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A picture to draw."""

    text: str
    seed: int
    draw: DrawSettings

    @classmethod
    def of_page(cls, text: str, *, seed: int, page: int, draw: DrawSettings) -> Caption:
        """With the noise that our model draws page `page` of an answer from, counted from 1."""
        return cls(text=text, seed=page_seed(seed, page), draw=draw)


class TextToPicture:
    """The diffusion model of a model folder, conditioned by the text encoder that it was trained with."""

    def __init__(self, config: ModelConfig, diffusion: Diffusion, text_encoder: nn.Module) -> None:
        self.config, self.diffusion, self.text_encoder = config, diffusion, text_encoder

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, num_threads: int | None = None, device: str | None = None
    ) -> TextToPicture:
        """Load a model folder. Raises ModelFolderError, BaseModelNotFound."""
        device = device or default_device()
        config, _, diffusion = load_decoder_model(folder, device=device, backend="auto", num_threads=num_threads)
        text_encoder = load_text_encoder(find_part(folder, config, config.text_encoder), config)
        return cls(config, diffusion, text_encoder.to(device))

    @torch.no_grad()
    def draw(self, captions: Sequence[Caption]) -> list[Image.Image]:
        """One picture for each caption, in their order. A caption that is too long for the text encoder is cut."""
        drawn: dict[int, Image.Image] = {}
        for settings in dict.fromkeys(caption.draw for caption in captions):
            places = [place for place, caption in enumerate(captions) if caption.draw == settings]
            for start in range(0, len(places), BATCH_SIZE):
                batch = places[start : start + BATCH_SIZE]
                drawn |= dict(zip(batch, self._draw([captions[place] for place in batch], settings), strict=True))
        return [drawn[place] for place in range(len(captions))]

    def _draw(self, captions: Sequence[Caption], settings: DrawSettings) -> list[Image.Image]:
        pixels_BCYX = denoise(
            self.diffusion,
            self.text_encoder([caption.text for caption in captions]),
            self.text_encoder([""]),
            seeds=[caption.seed for caption in captions],
            draw=self.config.native(settings),
            guidance_rescale=self.config.guidance_rescale,
        )
        pictures = [Image.fromarray(pixels_YXC) for pixels_YXC in to_pixels(pixels_BCYX)]
        size = self.config.size_of(settings)
        return [one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in pictures]
