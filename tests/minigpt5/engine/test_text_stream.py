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


@pytest.mark.parametrize(
    ("stop", "usual"),
    [("###", "A fox ran"), ("\n\nHuman:", "A fox ran"), ("sat", "A fox r"), ("\U0001f98a", "A fox ran")],
)
def test_nothing_of_a_stop_string_is_ever_shown(tokenizer: PreTrainedTokenizerBase, stop: str, usual: str) -> None:
    """`usual`: what whole tokens of the usual kind give before the stop string; "ransat" is "r", "ans", "at"."""
    text = f"A fox ran{stop} and more"
    usual_tokens = tokenizer.encode(text, add_special_tokens=False)
    for tokens, kept in ((tokens_by_character(tokenizer, text), "A fox ran"), (usual_tokens, usual)):
        shown, stream = show(tokenizer, tokens, stop)
        assert stream.is_stopped
        assert "".join(shown) == "A fox ran"
        assert tokenizer.decode(stream.tokens) == kept


def test_what_only_looks_like_a_stop_string_comes_late_but_comes(tokenizer: PreTrainedTokenizerBase) -> None:
    shown, _ = show(tokenizer, tokens_by_character(tokenizer, "a ##b #"), "###")
    assert "".join(shown) == "a ##b #"
    assert shown[2:4] == ["", ""] and shown[4] == "##b"
    assert shown[-1] == "#"


def test_the_first_of_several_stop_strings_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    shown, stream = show(tokenizer, tokens_by_character(tokenizer, "one two three"), "three", "two")
    assert "".join(shown) == "one " and stream.is_stopped
