"""Caption -> the text encoder's last hidden states: the base's own condition, and the target of the caption loss.

Every condition has the same number of positions and nothing of it is masked, so that what the mapper writes and what
the text encoder writes are read by the UNet in the same way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, CLIPTextModel, CLIPTokenizer

from minigpt5.config import ModelConfig


class TextEncoder(nn.Module):
    """A frozen sentence encoder, such as MiniLM-L6; padding is zero."""

    def __init__(self, folder: str | Path, *, num_positions: int) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.num_positions = num_positions

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Captions -> (B, num_positions, D); longer captions are cut."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.num_positions, return_tensors="pt"
        ).to(self.model.device)
        states_BQD = self.model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return nn.functional.pad(states_BQD, (0, 0, 0, self.num_positions - states_BQD.shape[1]))


class ClipTextEncoder(nn.Module):
    """The frozen text encoder of a Stable Diffusion folder; padding is what the model makes of its padding token.

    `published_quirks`: the caption's padding is hidden from attention, as Stable Diffusion never had it: the states
    of the padding differ strongly, those of the caption do not.
    """

    def __init__(self, folder: str | Path, *, num_positions: int, published_quirks: bool = False) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
        self.model = CLIPTextModel.from_pretrained(Path(folder) / "text_encoder", dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.num_positions, self.published_quirks = num_positions, published_quirks

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Captions -> (B, num_positions, D); longer captions are cut."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.num_positions, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens["attention_mask"] if self.published_quirks else None
        return self.model(tokens["input_ids"], attention_mask=mask).last_hidden_state


def load_text_encoder(folder: str | Path, config: ModelConfig) -> TextEncoder | ClipTextEncoder:
    """The text encoder of a base model's folder: of Stable Diffusion's layout, or a sentence encoder's."""
    if (Path(folder) / "text_encoder").is_dir():
        return ClipTextEncoder(folder, num_positions=config.condition_length, published_quirks=config.published_quirks)
    return TextEncoder(folder, num_positions=config.condition_length)
