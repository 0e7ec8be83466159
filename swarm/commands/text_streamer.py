"""Print text as it is generated."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase, TextStreamer

from swarm.commands.output import Output


class PrintingStreamer(TextStreamer):
    """A transformers streamer that prints through our output, and counts.

    Attributes:
        tokens: generated so far (the prompt does not count).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        output: Output,
        on_token: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_token` is called with the number of tokens so far, after each."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._output, self._on_token = output, on_token
        self.tokens = 0

    def put(self, value: object) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self.tokens += 1
            self._on_token(self.tokens)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._output.say(text, end="\n" if stream_end else "")
