"""Pictures of prompts -> embeddings, each content once, whichever engine writes.

Shape letters: H hidden width, Q embeddings of one picture, P embeddings of all pictures of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt5.engine.bounded_cache import BoundedCache
from minigpt5.model.vision import Vision

KEPT_BYTES = 64 * 2**20
"""Size of the embeddings that are kept."""


class PictureReader:
    """A vision path with a memory. `read` may run beside an engine's own thread."""

    def __init__(self, vision: Vision) -> None:
        self.vision = vision.eval()
        self._kept = BoundedCache[Tensor](KEPT_BYTES, size_bytes=lambda image_QH: image_QH.nbytes)

    @torch.no_grad()
    def read(self, pictures: Sequence[bytes]) -> tuple[Tensor, list[bytes]]:
        """Embeddings of all, in their order, (P, H), and the hash of each. Raises BadPicture."""
        torch.set_num_threads(1)  # of this thread, without a team
        digests = [hashlib.sha256(data).digest() for data in pictures]
        image_QHs = []
        for digest, data in zip(digests, pictures, strict=True):
            image_QH = self._kept.get(digest)
            if image_QH is None:
                image_QH = self.vision.read([data])[0]
                self._kept.put(digest, image_QH)
            image_QHs.append(image_QH)
        return torch.cat(image_QHs), digests
