"""Voken tokens: their ids, their rows in the embedding and the head, and which hidden states condition a picture.

Shape letters: B sequences, S positions, H hidden width, V vokens of a picture, P pictures, T vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACEHOLDER = "<ImageHere>"


def voken_names(num_vokens: int) -> list[str]:
    """[IMG0] .. [IMG7], as in the published code (the paper counts from 1)."""
    return [f"[IMG{i}]" for i in range(num_vokens)]


class VokenEmbeddings(nn.Module):
    """The rows that the new tokens add to the embedding and to the head: the only ones trained and stored.

    Ids go on after the base vocabulary: `first` .. `first + num_vokens - 1` are the vokens, `placeholder` marks the
    positions of an input picture's embeddings.
    """

    def __init__(self, vocabulary: int, num_vokens: int, hidden: int) -> None:
        super().__init__()
        self.first, self.num_vokens = vocabulary, num_vokens
        self.embedding = nn.Parameter(torch.zeros(num_vokens + 1, hidden))
        self.head = nn.Parameter(torch.zeros(num_vokens + 1, hidden))

    @property
    def placeholder(self) -> int:
        return self.first + self.num_vokens

    @property
    def ids(self) -> list[int]:
        return list(range(self.first, self.placeholder))

    @torch.no_grad()
    def initialise(self, embedding_TH: Tensor, head_TH: Tensor, *, seed: int) -> None:
        """Mean of the old rows plus noise of their spread: rows that start alike learn to differ too slowly."""
        for new, old in ((self.embedding, embedding_TH), (self.head, head_TH)):
            noise = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed))
            new.copy_(old.mean(dim=0) + noise * old.std(dim=0))

    def embed(self, ids_BS: Tensor, base: nn.Module) -> Tensor:
        """Token ids -> embeddings, old ones by the base model's embedding and new ones from here: (B, S, H)."""
        is_new_BS = ids_BS >= self.first
        old_BSH = base(ids_BS.masked_fill(is_new_BS, 0))
        new_BSH = F.embedding((ids_BS - self.first).clamp(min=0), self.embedding)
        return torch.where(is_new_BS[..., None], new_BSH, old_BSH)

    def extend(self, old_BST: Tensor, states_BSH: Tensor) -> Tensor:
        """The base model's logits, and those of the new rows after them."""
        return torch.cat([old_BST, F.linear(states_BSH, self.head)], dim=-1)

    def extend_evenly(self, old_BST: Tensor, states_BSH: Tensor) -> Tensor:
        """Do so with the same bits for a state in any company: slower, for few states."""
        new_BST = (states_BSH[..., None, :] * self.head).sum(dim=-1)
        return torch.cat([old_BST, new_BST.to(old_BST)], dim=-1)


def align(states_BSH: Tensor, ids_BS: Tensor, voken_embeddings: VokenEmbeddings) -> tuple[Tensor, Tensor]:
    """The states that condition each picture of a batch, in reading order, and where they are.

    They are the states that predict [IMG0] .. [IMG7]: one before [IMG0], then at [IMG0] .. [IMG6]. Returns
    (P, V, H) and the (sequence, position) of each picture's first state: (P, 2).
    """
    where_P2 = (ids_BS == voken_embeddings.first).nonzero()
    where_P2 = where_P2 - torch.tensor([0, 1], device=where_P2.device)
    offsets_V = torch.arange(voken_embeddings.num_vokens, device=states_BSH.device)
    positions_PV = where_P2[:, 1:] + offsets_V
    return states_BSH[where_P2[:, :1], positions_PV], where_P2
