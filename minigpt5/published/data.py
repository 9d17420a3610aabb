"""The published training samples, as pure functions from rows: CC3M, VIST and MMDialog (arXiv 2310.02239, 4).

A sample is two strings, as the published code builds them, and the pictures that their slots and vokens stand for.
`sample_segments` brings it into the one template of training and serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minigpt5.model.prompt import (
    ASKS_FOR_BOTH,
    ASKS_FOR_PICTURE,
    ASKS_FOR_TEXT,
    DRAW_TARGET,
    END,
    READ,
    READ_AND_TELL,
    Segment,
    text_segment,
)

SLOT = "<Img><ImageHere></Img>"
DRAWN = "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7]"
READ_AND_TALK = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide "
    "it to you. Please generate conversations with appropriate images."
)
DRAW_ON_COMMAND = "You will be able to generate image according to command."
COMMANDS = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)
COMMAND_EVERY = 100
"""Rows of CC3M between those that are also given as a command, so that a chat model stays one."""
MAX_TURN_TOKENS = 50


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model reads, what it learns to write, and the pictures in both."""

    source: str
    target: str
    read: tuple[str, ...] = ()
    """Pictures of the source's slots, in order: ids or paths."""
    drawn: str | None = None
    """The picture of the target's vokens."""
    caption: str | None = None
    """For the caption loss."""
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a dialogue, with at most one picture."""

    text: str
    picture: str | None = None


def clean_caption(caption: str) -> str:
    """Lower case, without the characters . ! " ( ) * # : ; ~, single spaces."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split())


def cc3m_samples(rows: Sequence[tuple[str, str]], *, is_training: bool = True) -> Iterator[Sample]:
    """(caption, picture) rows -> the bare caption and its vokens, and in training every hundredth as a command too."""
    for index, (raw, picture) in enumerate(rows):
        caption = clean_caption(raw)
        target = f"{DRAWN}{END}"
        yield Sample(source=caption, target=target, drawn=picture, caption=caption, task="caption")
        if is_training and index % COMMAND_EVERY == 0:
            command = COMMANDS[index // COMMAND_EVERY % len(COMMANDS)]
            source = f"{DRAW_ON_COMMAND}###Human: {command} {caption} ###Assistant:"
            yield Sample(source=source, target=target, drawn=picture, caption=caption, task="command")


def vist_samples(
    steps: Sequence[tuple[str, str]], *, is_training: bool = True, variant: Callable[[int], int] = lambda count: 0
) -> Iterator[Sample]:
    """(text, picture) steps of one story -> its samples: 13 of five steps in training, 5 in testing.

    `variant(count)` chooses among `count` published wordings, from 0.
    """
    for index, (words, picture) in enumerate(steps):
        history = "".join(f"{past}{SLOT}" for past, _ in steps[:index]) + ("\n" if index else "")
        read = tuple(past for _, past in steps[:index])
        prompt = f"{READ_AND_TELL}###Human:{history}"
        ask = ASKS_FOR_PICTURE[variant(len(ASKS_FOR_PICTURE))]
        source = f"{prompt}{ask}{words} ###Assistant:"
        yield Sample(source=source, target=f"{DRAWN}{END}", read=read, drawn=picture, task="picture")
        if not (is_training and index):
            continue
        ask = ASKS_FOR_BOTH[variant(len(ASKS_FOR_BOTH))]
        target = f"{words} {DRAWN}{END}"
        yield Sample(source=f"{prompt}{ask} ###Assistant:", target=target, read=read, drawn=picture, task="both")
        ask = ASKS_FOR_TEXT[variant(len(ASKS_FOR_TEXT))]
        source = f"{prompt}{ask}{SLOT} ###Assistant:"
        yield Sample(source=source, target=f"{words}{END}", read=(*read, picture), task="text")


def mmdialog_samples(
    turns: Sequence[Turn],
    *,
    is_training: bool = True,
    has_picture: Callable[[str], bool] = lambda picture: True,
    count_tokens: Callable[[str], int] = lambda words: len(words.split()),
) -> Iterator[Sample]:
    """One dialogue -> a sample for each turn but the first; Human turns are predicted too.

    The dialogue ends before the first turn without text, with a file name for a text, with a picture that is not
    there, or, in training, with more than 50 tokens.
    """
    usable: list[Turn] = []
    for turn in turns:
        words = turn.text.strip()
        is_lost = turn.picture is not None and not has_picture(turn.picture)
        if not words or words.endswith(".jpg") or is_lost:
            break
        if is_training and count_tokens(words) > MAX_TURN_TOKENS:
            break
        usable.append(Turn(text=words, picture=turn.picture))
    for index in range(1, len(usable)):
        start = first_turn(index)
        said = [_say(number, usable[number]) for number in range(start, index)]
        turn = usable[index]
        yield Sample(
            source=" ".join([READ_AND_TALK, *said, _role(index)]),
            target=f"{turn.text} {DRAWN}{END}" if turn.picture else f"{turn.text}{END}",
            read=tuple(past.picture for past in usable[start:index] if past.picture),
            drawn=turn.picture,
            task="dialogue",
        )


def first_turn(index: int) -> int:
    """Where the history of turn `index` begins: with the last exchange that is closed, from the second one on."""
    last_closed = index // 2 - 1
    return 2 * last_closed if last_closed >= 1 else 0


def _role(index: int) -> str:
    return "###Assistant:" if index % 2 else "###Human:"


def _say(index: int, turn: Turn) -> str:
    return " ".join([_role(index), turn.text, *([SLOT] if turn.picture else [])])


def sample_segments(sample: Sample) -> list[Segment]:
    """A sample in the template's terms: texts, pictures that are read, vokens."""
    segments: list[Segment] = []
    for number, words in enumerate(sample.source.split("<ImageHere>")):
        segments += [READ] if number else []
        segments += [text_segment(words)] if words else []
    for number, words in enumerate(sample.target.split(DRAWN)):
        segments += [DRAW_TARGET] if number else []
        segments += [text_segment(words, is_target=True)] if words else []
    return segments
