"""Positions of tokens where a language model counts a picture's embeddings by rows and columns (M-RoPE).

Shape letters: B sequences, S positions of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_positions(is_picture_BS: Tensor, side: int) -> Tensor:
    """Where embeddings of pictures are -> time, row and column of each token: (3, B, S).

    As in Qwen2-VL (arXiv 2409.12191, 2.1): a text token has one position for all three. The `side` x `side` embeddings
    of a picture share their time, and the token after them has the position after the picture's last row.
    """
    num_seen_BS = is_picture_BS.long().cumsum(dim=1)
    area = side * side
    place_BS = ((num_seen_BS - 1) % area).where(is_picture_BS, 0)
    num_whole_BS = torch.where(is_picture_BS, num_seen_BS - 1, num_seen_BS) // area
    at_S = torch.arange(is_picture_BS.shape[1], device=is_picture_BS.device)
    start_BS = at_S - place_BS - num_whole_BS * (area - side)
    return torch.stack([start_BS, start_BS + place_BS // side, start_BS + place_BS % side])
