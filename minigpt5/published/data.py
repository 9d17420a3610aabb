"""The published training samples, as pure functions from rows: CC3M, VIST and MMDialog (arXiv 2310.02239, 4).

A sample is two strings, as the published code builds them, and the pictures that their slots and vokens stand for.
`sample_segments` brings it into the template of training and serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minigpt5.model.chat_template import ChatTemplate
from minigpt5.model.prompt import (
    ASKS_FOR_BOTH,
    ASKS_FOR_PICTURE,
    ASKS_FOR_TEXT,
    DRAW_TARGET,
    READ,
    READ_AND_TELL,
    Segment,
    Template,
    text_segment,
)
from minigpt5.model.published_template import END, PUBLISHED

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
    turns: tuple[str, ...] = ()
    """What the source says without the published frame: user and assistant in turn, the user first and last."""
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
            turns = (f"{DRAW_ON_COMMAND} {command} {caption}",)
            yield Sample(source=source, target=target, turns=turns, drawn=picture, caption=caption, task="command")


def vist_samples(
    steps: Sequence[tuple[str, str]], *, is_training: bool = True, variant: Callable[[int], int] = lambda count: 0
) -> Iterator[Sample]:
    """(text, picture) steps of one story -> its samples: 13 of five steps in training, 5 in testing.

    `variant(count)` chooses among `count` published wordings, from 0.
    """
    for index, (words, picture) in enumerate(steps):
        prompt, said, read = _tell(steps[:index])
        ask = ASKS_FOR_PICTURE[variant(len(ASKS_FOR_PICTURE))]
        source = f"{prompt}{ask}{words} ###Assistant:"
        turns = (f"{said}\n{ask.strip()} {words.strip()}",)
        yield Sample(source=source, target=f"{DRAWN}{END}", turns=turns, read=read, drawn=picture, task="picture")
        if not (is_training and index):
            continue
        ask = ASKS_FOR_BOTH[variant(len(ASKS_FOR_BOTH))]
        source, target, turns = f"{prompt}{ask} ###Assistant:", f"{words} {DRAWN}{END}", (f"{said}\n{ask.strip()}",)
        yield Sample(source=source, target=target, turns=turns, read=read, drawn=picture, task="both")
        ask = ASKS_FOR_TEXT[variant(len(ASKS_FOR_TEXT))]
        source = f"{prompt}{ask}{SLOT} ###Assistant:"
        turns = (f"{said}\n{ask.strip()} {SLOT}",)
        yield Sample(source=source, target=f"{words}{END}", turns=turns, read=(*read, picture), task="text")


def ending_sample(steps: Sequence[tuple[str, str]], words: str) -> Sample:
    """What a story tells after its last picture. VIST has no such text: of the published wordings it takes the one that
    names no picture."""
    prompt, said, read = _tell(steps)
    ask = ASKS_FOR_BOTH[-1]
    source, turns = f"{prompt}{ask} ###Assistant:", (f"{said}\n{ask.strip()}",)
    return Sample(source=source, target=f"{words}{END}", turns=turns, read=read, task="ending")


def _tell(steps: Sequence[tuple[str, str]]) -> tuple[str, str, tuple[str, ...]]:
    """Earlier steps as the source has them, as its turns have them, and their pictures."""
    history = "".join(f"{past}{SLOT}" for past, _ in steps) + ("\n" if steps else "")
    said = READ_AND_TELL + "".join(f" {past.strip()}{SLOT}" for past, _ in steps)
    return f"{READ_AND_TELL}###Human:{history}", said, tuple(picture for _, picture in steps)


def mmdialog_samples(
    turns: Sequence[Turn],
    *,
    is_training: bool = True,
    has_picture: Callable[[str], bool] = lambda picture: True,
    count_tokens: Callable[[str], int] = lambda words: len(words.split()),
    max_turn_tokens: int | None = MAX_TURN_TOKENS,
) -> Iterator[Sample]:
    """One dialogue -> a sample for each turn but the first; Human turns are predicted too. Among a sample's `turns` the
    one that is predicted is the assistant's.

    The dialogue ends before the first turn without text, with a file name for a text, with a picture that is not
    there, or, in training, with more than `max_turn_tokens`; None: with any number.
    """
    usable: list[Turn] = []
    for turn in turns:
        words = turn.text.strip()
        is_lost = turn.picture is not None and not has_picture(turn.picture)
        if not words or words.endswith(".jpg") or is_lost:
            break
        if is_training and max_turn_tokens is not None and count_tokens(words) > max_turn_tokens:
            break
        usable.append(Turn(text=words, picture=turn.picture))
    for index in range(1, len(usable)):
        start = first_turn(index)
        said = [_say(number, usable[number]) for number in range(start, index)]
        turn, history = usable[index], [_words(past) for past in usable[start:index]]
        is_asked = len(history) % 2  # the first turn is the user's, with the instruction
        yield Sample(
            turns=(f"{READ_AND_TALK} {history[0]}", *history[1:]) if is_asked else (READ_AND_TALK, *history),
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
    return f"{_role(index)} {_words(turn)}"


def _words(turn: Turn) -> str:
    return f"{turn.text} {SLOT}" if turn.picture else turn.text


def sample_segments(sample: Sample, template: Template = PUBLISHED) -> list[Segment]:
    """A sample in the template's terms: texts, pictures that are read, vokens."""
    if isinstance(template, ChatTemplate):
        return _chat_segments(sample, template)
    segments = _read_slots(sample.source)
    for number, words in enumerate(sample.target.split(DRAWN)):
        segments += [DRAW_TARGET] if number else []
        segments += [text_segment(words, is_target=True)] if words else []
    return segments


def _chat_segments(sample: Sample, template: ChatTemplate) -> list[Segment]:
    if not sample.turns:
        return template.caption(sample.source)
    said = sample.target.removesuffix(END).removesuffix(DRAWN)
    asked = template.turns([_read_slots(turn) for turn in sample.turns])
    return [*asked, *template.answer(said, draws=sample.drawn is not None)]


def _read_slots(source: str) -> list[Segment]:
    """Text with slots -> texts and pictures that are read."""
    segments: list[Segment] = []
    for number, words in enumerate(source.split("<ImageHere>")):
        segments += [READ] if number else []
        segments += [text_segment(words)] if words else []
    return segments
