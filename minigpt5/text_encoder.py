"""Caption -> the text encoder's last hidden states: the base's own condition, and the target of the caption loss.

Every condition has the same number of positions; padding is zero and nothing is masked, so that what the mapper
writes and what the text encoder writes are read by the UNet in the same way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer


class TextEncoder(nn.Module):
    """A frozen text encoder, such as MiniLM-L6."""

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
        )
        states_BQD = self.model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return nn.functional.pad(states_BQD, (0, 0, 0, self.num_positions - states_BQD.shape[1]))
