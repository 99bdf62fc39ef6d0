"""Generated tokens as text, as far as it is certain."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.tokenizers import Tokenizer

# What decoders write for bytes that are no whole character.
_UNFINISHED = "\ufffd"


class TextStream:
    """Text of the tokens that follow `before`, in pieces: a character that takes several tokens comes when it is whole.

    Only the last tokens are decoded anew, together with some before them: a decoder may write a token otherwise at the
    beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._start = 0
        self._shown = len(before)

    def add(self, token: int) -> str:
        """The text that is certain with one more token, since the last call; often empty."""
        self._ids.append(token)
        text, new = self._pending()
        if text.endswith(_UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def end(self) -> str:
        """The rest, with a mark in the place of a character that was not finished."""
        return self._pending()[1]

    def _pending(self) -> tuple[str, str]:
        known = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        return text, text[len(known) :]
