"""Batches in which every worker calls the same parts of the model in the same order, as workers must that share out
its weights (ZeRO 3, arXiv 1910.02054): one that skipped a part would leave the others waiting for its weights."""

from __future__ import annotations

import numpy as np

from minigpt5.config import ModelConfig
from minigpt5.model import prompt
from minigpt5.objective.example import Example


class DummyExamples:
    """Examples without a loss, for pictures that no example of a batch reads or draws."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        reads_pictures: bool,
        read: np.ndarray | None = None,
        drawn: np.ndarray | None = None,
    ) -> None:
        """`reads_pictures`: whether the vision encoder is there to be called. `read`, `drawn`: pictures in the form in
        which the data has those that are read and drawn; by default pixels. Stored features and moments do not call
        the encoders, and what is added must not either."""
        self._reads_pictures = reads_pictures
        read_px, drawn_px = config.vision.image_px, config.image_px
        read = np.zeros((read_px, read_px, 3), np.uint8) if read is None else np.zeros_like(read)
        drawn = np.zeros((drawn_px, drawn_px, 3), np.uint8) if drawn is None else np.zeros_like(drawn)
        dot = prompt.text_segment(".")
        self._reads = Example(segments=[dot, prompt.READ], read=[read], drawn=[], captions=[])
        self._draws = Example(segments=[dot, prompt.DRAW], read=[], drawn=[drawn], captions=[""])

    def complete(self, examples: list[Example]) -> list[Example]:
        """The examples, and those after them that are needed."""
        needs_read = self._reads_pictures and not any(example.read for example in examples)
        needs_drawn = not any(example.drawn for example in examples)
        return [*examples, *([self._reads] if needs_read else []), *([self._draws] if needs_drawn else [])]
