"""Caption -> the text encoder's last hidden states: the base's own condition, and the target of the caption loss.

Every condition has the same number of positions and nothing of it is masked, so that what the mapper writes and what
the text encoder writes are read by the UNet in the same way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

from minigpt5.config import ModelConfig
from minigpt5.model.decoders.load import find_family
from minigpt5.model.libraries import load_auto, load_base_tokenizer
from minigpt5.model.weights import load_quietly


class TextEncoder(nn.Module):
    """A frozen sentence encoder, such as MiniLM-L6; padding is zero."""

    def __init__(self, folder: str | Path, *, num_positions: int) -> None:
        super().__init__()
        self.tokenizer = load_base_tokenizer(folder)
        model = load_auto(AutoModel, folder, may_lack=("pooler.",), dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        self.num_positions = num_positions

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Captions -> (B, num_positions, D); longer captions are cut."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.num_positions, return_tensors="pt"
        ).to(self.model.device)
        states_BQD = self.model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return nn.functional.pad(states_BQD, (0, 0, 0, self.num_positions - states_BQD.shape[1]))


def load_text_encoder(folder: str | Path, config: ModelConfig) -> nn.Module:
    """The text encoder of a base model's folder: a diffusion model's own, or a sentence encoder. One that has its
    tokenizer beside it, and not in `tokenizer/` as in diffusers' layout, is a sentence encoder too."""
    load_quietly()
    folder = Path(folder)
    if (own := folder / "text_encoder").is_dir() and not (own / "tokenizer.json").is_file():
        family = find_family(folder)
        quirks = {"published_quirks": True} if config.published_quirks else {}
        return family.load_text_encoder(folder, num_positions=config.condition_length, **quirks)
    return TextEncoder(own if own.is_dir() else folder, num_positions=config.condition_length)
