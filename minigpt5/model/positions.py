"""What the place of pictures in a sequence decides: positions by rows and columns (M-RoPE), and what tokens see.

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


def last_seen(is_picture_BS: Tensor) -> Tensor:
    """Where embeddings of pictures are -> the last place that each token attends to: (B, S).

    It is a token's own place, or the end of its picture. Pictures are apart from each other.
    """
    length = is_picture_BS.shape[1]
    at_S = torch.arange(length, device=is_picture_BS.device)
    next_text_BS = at_S.where(~is_picture_BS, length).flip(1).cummin(dim=1).values.flip(1)
    return next_text_BS - is_picture_BS.long()
