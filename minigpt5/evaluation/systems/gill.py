"""GILL (arXiv 2305.17216): a frozen language model, vokens whose mapper learnt captions alone, and for each picture a
decision whether to draw it or to retrieve it from an index."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch

from minigpt5.engine.decoder import DiffusionDecoder, to_file
from minigpt5.evaluation.systems.folder import MODEL
from minigpt5.evaluation.systems.ours import MiniGPT5System
from minigpt5.evaluation.systems.retrieval import PictureIndex, Retrieval, load_retrieval
from minigpt5.pictures import resample
from minigpt5.pipeline import MiniGPT5
from minigpt5.types import DecoderEvent, DrawRequest, Picture


class RetrievingDecoder:
    """A decoder that shows a picture of an index where the decision says so, and draws elsewhere."""

    def __init__(self, decoder: DiffusionDecoder, retrieval: Retrieval, index: PictureIndex) -> None:
        self.decoder, self.retrieval, self.index = decoder, retrieval, index
        self.num_retrieved = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    @torch.no_grad()
    def find(self, request: DrawRequest) -> int | None:
        """The position of the picture to show, or None to draw one."""
        texts_1W = self.retrieval.embed_states(torch.from_numpy(request.vokens.hidden_VH).float()[None])
        places_1, cosines_1 = self.index.nearest(texts_1W)
        return int(places_1) if self.retrieval.decision(texts_1W, cosines_1) > 0 else None

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        """As the decoder's. Raises as that does."""
        self.decoder.validate_request(request)
        place = self.find(request)
        if place is None:
            async for event in self.decoder.decode(request):
                yield event
            return
        self.num_retrieved += 1
        width, height = self.decoder.config.size_of(request.settings)
        png = resample(to_file(self.index.pictures_NYXC[place], "PNG"), (width, height))
        yield Picture(page=request.vokens.page, png=png, width=width, height=height, seed=request.seed, denoise_steps=0)


class GillSystem(MiniGPT5System):
    """A `System`."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_threads: int | None = None, device: str | None = None
    ) -> GillSystem:
        system = MiniGPT5System.from_pretrained(Path(folder) / MODEL, num_threads=num_threads, device=device)
        config = system.model.config
        parts = load_retrieval(Path(folder), num_vokens=config.num_vokens, hidden=config.hidden)
        decoder: Any = RetrievingDecoder(system.model.decoder, *parts)
        return cls(MiniGPT5(system.model.generator, decoder))
