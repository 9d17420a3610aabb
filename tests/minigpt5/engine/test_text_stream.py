"""What is shown while text is written: whole characters, nothing of a stop string."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from minigpt5.engine.text_stream import TextStream
from tests.helpers.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tiny_config())


def show(tokenizer: PreTrainedTokenizerBase, tokens: list[int], *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    shown = []
    for token in tokens:
        shown.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*shown, stream.end()], stream


def tokens_by_character(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize each character by itself: as far from the usual tokens as it gets."""
    return [token for character in text for token in tokenizer.encode(character, add_special_tokens=False)]


@pytest.mark.parametrize("text", ["A fox sat.", "na\u00efve caf\u00e9 \U0001f98a runs", "\u72d0\u72f8 and \u2603"])
def test_everything_is_shown_once_and_no_broken_character(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for tokens in (tokenizer.encode(text, add_special_tokens=False), tokens_by_character(tokenizer, text)):
        shown, stream = show(tokenizer, tokens, "###")
        assert "".join(shown) == text
        assert not any("\ufffd" in piece for piece in shown)
        assert stream.tokens == tokens


@pytest.mark.parametrize("stop", ["###", "\n\nHuman:", "sat", "\U0001f98a"])
@pytest.mark.parametrize("split", [True, False])
def test_nothing_of_a_stop_string_is_ever_shown(tokenizer: PreTrainedTokenizerBase, stop: str, split: bool) -> None:
    text = f"A fox ran{stop} and more"
    tokens = tokens_by_character(tokenizer, text) if split else tokenizer.encode(text, add_special_tokens=False)
    shown, stream = show(tokenizer, tokens, stop)
    assert stream.is_stopped
    assert "".join(shown) == "A fox ran"
    assert tokenizer.decode(stream.tokens) in ("A fox ran", "A fox", "A fox r")  # whole tokens before it


def test_what_only_looks_like_a_stop_string_comes_late_but_comes(tokenizer: PreTrainedTokenizerBase) -> None:
    shown, _ = show(tokenizer, tokens_by_character(tokenizer, "a ##b #"), "###")
    assert "".join(shown) == "a ##b #"
    assert shown[2:4] == ["", ""] and shown[4] == "##b"
    assert shown[-1] == "#"


def test_the_first_of_several_stop_strings_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    shown, stream = show(tokenizer, tokens_by_character(tokenizer, "one two three"), "three", "two")
    assert "".join(shown) == "one " and stream.is_stopped
