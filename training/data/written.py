"""Examples of systems that write where ours draws, and of those that read no pictures."""

from __future__ import annotations

import dataclasses

from minigpt5.evaluation.systems.marks import MARK, describe
from minigpt5.model.prompt import join_texts, text_segment
from minigpt5.objective.example import Example
from training.presets import DrawsBy


def write_out(example: Example, draws_by: DrawsBy, *, reads_pictures: bool = True) -> Example:
    """The example with drawn pictures as text, and without pictures that are read where the model reads none.

    Neighbouring texts are joined: what a system is asked with is tokenized as one text.
    """
    if draws_by == "vokens" and (reads_pictures or not example.read):
        return example
    captions = iter(example.captions)
    segments = []
    for segment in example.segments:
        if segment.kind == "draw" and draws_by != "vokens":
            words = describe(next(captions)) if draws_by == "description" else MARK
            segments.append(text_segment(words, is_target=segment.is_target))
        elif segment.kind != "read" or reads_pictures:
            segments.append(segment)
    example = dataclasses.replace(
        example, segments=join_texts(segments), tokens=None, read=example.read if reads_pictures else []
    )
    if draws_by == "vokens":
        return example
    return dataclasses.replace(example, drawn=[], captions=[], contrasts=[], is_caption=False)
