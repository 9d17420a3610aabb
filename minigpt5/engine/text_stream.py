"""Tokens -> text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one page while it is written.

    Stop strings are matched on the decoded text, so that it does not matter how a tokenizer parts them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self.tokens: list[int] = []
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._num_shown = 0

    @property
    def max_taken_back(self) -> int:
        """Tokens that a stop string may reach back over: at most four for each of its characters."""
        return 4 * max(map(len, self._stop), default=0)

    def add(self, token: int) -> str:
        """What may now be shown. At a stop string: the rest before it, and `tokens` keeps those wholly before it."""
        self.tokens.append(token)
        text = self._decode(self.tokens)
        found = [place for string in self._stop if (place := text.find(string)) >= 0]
        if found:
            self.is_stopped = True
            text = text[: min(found)]
            while self.tokens and len(self._decode(self.tokens)) > len(text):
                self.tokens.pop()
            return self._show(text)
        if text.endswith("\ufffd"):  # a character whose bytes are not all there
            return ""
        return self._show(text[: len(text) - self._num_held(text)])

    def end(self) -> str:
        """What was held back and has turned out to be no stop string."""
        return "" if self.is_stopped else self._show(self._decode(self.tokens))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens).lstrip()

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new

    def _num_held(self, text: str) -> int:
        """The longest end of `text` that a stop string begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((num for num in lengths if any(stop.startswith(text[-num:]) for stop in self._stop)), 0)
