"""Text out of tokens, piece by piece: nothing is sent that a later token, or a stop sequence, could take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoders write it for the first bytes of a character whose others have not come yet."""
_MOST_UNFINISHED = 64
"""Tokens. A model that writes none but broken characters need not be taken that seriously."""


@dataclass(frozen=True)
class Piece:
    """What one token added to the text that may be shown."""

    text: str
    stopped: bool
    """A stop sequence has come: the text ends with this piece."""


class TextPieces:
    """Turns the tokens of one answer into text. All pieces together are the tokenizer's text of all tokens.

    Args:
        stop: the text ends before the first of these that is complete.

    Attributes:
        stopped_by: the one that came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded together: the text of one may depend on those before
        self._complete = 0  # tokens whose text has been taken whole
        self._taken = 0  # characters, of the text from `_context` on
        self._held = ""  # may be the beginning of a stop sequence
        self.stopped_by: str | None = None

    def add(self, token: int) -> Piece:
        """The text that can be shown now that `token` has come."""
        self._tokens.append(token)
        text = self._decoded(self._context)
        # An unfinished character is one replacement character, at the very end.
        unfinished = text.endswith(_UNFINISHED) and len(self._tokens) - self._complete < _MOST_UNFINISHED
        certain = text[:-1] if unfinished else text
        new, self._taken = certain[self._taken :], max(self._taken, len(certain))
        if not unfinished:
            self._context, self._complete = self._complete, len(self._tokens)
            self._taken = len(self._decoded(self._context))
        return self._past_stops(new)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        rest = self._past_stops(self._decoded(self._context)[self._taken :])
        held, self._held = self._held, ""
        return rest.text if rest.stopped else rest.text + held

    def _decoded(self, begin: int) -> str:
        return str(
            self._tokenizer.decode(self._tokens[begin:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _past_stops(self, new: str) -> Piece:
        text = self._held + new
        found = [(index, stop) for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            index, self.stopped_by = min(found)
            self._held = ""
            return Piece(text[:index], True)
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return Piece(text[: len(text) - kept], False)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
