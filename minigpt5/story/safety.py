"""Filters of texts and pictures, for who shows stories to others: small public models, none of them infallible.

The text filter is a linear model over words that knows profanity and insults in English (alt-profanity-check, MIT); the
picture filter knows nudity (Yahoo's Open-NSFW, BSD-2). No torch here: an HTTP front filters texts.
"""

from __future__ import annotations

import io
import json
import re

import numpy as np
from PIL import Image

from minigpt5.errors import Blocked
from minigpt5.model.base_models import load_arrays, resolve
from minigpt5.pictures import open_picture

TEXT_FILTER = "profanity-check"
PICTURE_FILTER = "open-nsfw"
MAX_TEXT_SCORE = 0.99
"""Threshold, from 0 to 1: stories of the picture world reach 0.973, insults 0.995; "the pig was fat" is over it."""
MAX_PICTURE_SCORE = 0.8
"""What the picture filter's authors take for certain."""
_WORD = re.compile(r"(?u)\b\w\w+\b")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_PIECE = 6
"""A sentence is read in pieces of so many words that overlap by half: in a long one, a single word weighs little."""


class TextFilter:
    """Texts -> how sure it is that they insult.

    Example: TextFilter().check_text("A fox finds a balloon.", "prompt")
    """

    def __init__(self) -> None:
        """Raises BaseModelNotFound where the filter's package is not installed."""
        folder = resolve(TEXT_FILTER)
        tensors = load_arrays(folder)
        self._vocabulary: dict[str, int] = json.loads((folder / "vocabulary.json").read_text())
        self._idf_W = tensors["idf"]
        self._weights_FW, self._bias_F = tensors["weights"], tensors["bias"]
        self._slope_F, self._offset_F = tensors["slope"], tensors["offset"]

    def score(self, text: str) -> float:
        """From 0 to 1: of its worst piece."""
        return max(map(self._score, self._pieces(text)), default=0.0)

    def check_text(self, text: str, what: str) -> None:
        """Raise Blocked where `text`, which is `what` ("prompt", "page 2"), is not to be shown."""
        if self.score(text) > MAX_TEXT_SCORE:
            raise Blocked(f"{what} was stopped by the text filter: say it in other words")

    def _pieces(self, text: str) -> list[list[str]]:
        """The known words of each sentence, a long one in pieces."""
        pieces = []
        for sentence in _SENTENCE.split(text.lower()):
            words = [word for word in _WORD.findall(sentence) if word in self._vocabulary]
            last = max(1, len(words) - _PIECE // 2)
            pieces += [words[start : start + _PIECE] for start in range(0, last, _PIECE // 2) if words]
        return pieces

    def _score(self, words: list[str]) -> float:
        """Of words that are in the vocabulary, weighed by how rare they are; each fold's margin made a probability
        (Platt, 1999), their mean."""
        known, counts = np.unique([self._vocabulary[word] for word in words], return_counts=True)
        values = counts * self._idf_W[known]
        values = values / np.linalg.norm(values)
        margins_F = self._weights_FW[:, known] @ values + self._bias_F
        return float(np.mean(1 / (1 + np.exp(self._slope_F * margins_F + self._offset_F))))


class PictureFilter:
    """Pictures -> how sure it is that they show nudity."""

    def __init__(self) -> None:
        """Raises BaseModelNotFound where the filter's package is not installed."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the engines have the cores
        path = resolve(PICTURE_FILTER) / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def score(self, data: bytes) -> float:
        """Score an encoded picture, from 0 to 1."""
        [[_, score]] = self._session.run(None, {"input_0": _prepare(data)[None]})[0]
        return float(score)

    def check_picture(self, data: bytes) -> None:
        """Raise Blocked where a picture is not to be shown."""
        if self.score(data) > MAX_PICTURE_SCORE:
            raise Blocked("the picture was stopped by the picture filter")


def _prepare(data: bytes) -> np.ndarray:
    """Prepare a picture as in the filter's training: 256 px, JPEG, the middle 224 px, BGR, less the mean."""
    picture = open_picture(data).resize((256, 256), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    picture.save(file, "JPEG")
    pixels = np.asarray(open_picture(file.getvalue()), np.float32)[16:240, 16:240, ::-1]
    return pixels - np.array([104, 117, 123], np.float32)
