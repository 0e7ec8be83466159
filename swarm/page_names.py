"""Names of what a session begins with: a chain of hashes over hidden states, page by page.

A server that has computed a page of positions remembers it by its name, so whoever comes with the same beginning is not
computed again; and who is about to send hidden states can ask by name whether the other side has seen them already,
and then need not send them. A name stands for the page and for all before it. Who knows it knows the content: it
says nothing to anybody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch

PAGE = 16
"""Positions on a page."""
NAME_BYTES = 32


@dataclass(frozen=True)
class Content:
    """All that the keys and values of some positions depend on, besides what came before; on the CPU."""

    ids: torch.Tensor | range
    """Their numbers, ``[n]``."""
    states: torch.Tensor
    """The hidden states that came in, ``[n, hidden]``."""

    def __len__(self) -> int:
        return len(self.states)

    def part(self, begin: int, end: int) -> Content:
        """Of the positions ``[begin, end)``."""
        return Content(self.ids[begin:end], self.states[begin:end])

    def copy(self) -> Content:
        """In memory of its own, with nothing else."""
        return Content(self.ids if isinstance(self.ids, range) else self.ids.clone(), self.states.clone())


def part_of(contents: Sequence[Content], begin: int, end: int) -> list[Content]:
    """Of the positions ``[begin, end)`` of what follows one another."""
    parts, at = [], 0
    for content in contents:
        if begin < at + len(content) and at < end:
            parts.append(content.part(max(begin - at, 0), end - at))
        at += len(content)
    return parts


def name_of(before: bytes, page: Iterable[Content]) -> bytes:
    """Of a page, whatever parts it came in.

    Args:
        before: the name of the page before it; nothing for the first.
    """
    parts = list(page)
    return _hashed(before, parts, [content.states for content in parts])


def name_made(before: bytes, page: Iterable[Content], output: torch.Tensor) -> bytes:
    """Of what a server makes of a page, `output` ``[PAGE, hidden]``: so the next one calls what comes in.

    Args:
        before: likewise, of the page before it.
    """
    return _hashed(before, page, [output])


def names_of(hidden_states: Sequence[torch.Tensor], most: int) -> list[bytes]:
    """Of the full pages of one sequence, from position 0 on, `most` at most.

    Args:
        hidden_states: ``[n, hidden]`` each, one after the other, on the CPU.
    """
    contents, at = [], 0
    for states in hidden_states:
        contents.append(Content(range(at, at + len(states)), states))
        at += len(states)
    names: list[bytes] = []
    for begin in range(0, min(at // PAGE, most) * PAGE, PAGE):
        names.append(name_of(names[-1] if names else b"", part_of(contents, begin, begin + PAGE)))
    return names


def _hashed(before: bytes, page: Iterable[Content], states: Iterable[torch.Tensor]) -> bytes:
    name = hashlib.blake2b(before, digest_size=NAME_BYTES)
    for content in page:
        ids = content.ids
        numbers = (
            numpy.arange(ids.start, ids.stop) if isinstance(ids, range) else ids.to(torch.int64).contiguous().numpy()
        )
        name.update(numbers.data)
    for part in states:
        name.update(part.contiguous().view(torch.uint8).numpy().data)
    return name.digest()
