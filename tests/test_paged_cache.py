"""A cache on pages gives layers what transformers' own would, whatever sessions do, and what is known is reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import SUPPORTED
from tiny_models import save_tiny_model

from swarm.models import Span, load_span, open_checkpoint
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.page_names import PAGE

CHUNKS = (5, 1, 1, 17, 3, 1, 20)
"""They cross pages and sliding windows."""


def span_of(name: str, directory: Path) -> tuple[Span, int]:
    save_tiny_model(name, directory)
    checkpoint = open_checkpoint(directory)
    return load_span(checkpoint, 1, 4, dtype=torch.float32), checkpoint.hidden_size


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Span, int]:
    return span_of("llama", tmp_path_factory.mktemp("llama"))


def states(rows: int, positions: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, positions, hidden, generator=torch.Generator().manual_seed(seed))


def run(span: Span, cache: PagedCache, new: torch.Tensor) -> torch.Tensor:
    cache.begin(*new.shape[:2])
    return span.forward(new, cache)


def run_and_remember(span: Span, cache: PagedCache, new: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(outputs, positions that were not computed)"""
    known = cache.reuse(new, None)
    done = 0 if known is None else known.shape[1]
    if done == new.shape[1]:
        assert known is not None
        return known, done
    begin = cache.length
    output = run(span, cache, new[:, done:])
    cache.remember(new[:, done:], None, output, begin)
    return (output if known is None else torch.cat([known, output], dim=1)), done


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "scattered"])
def test_every_family_takes_its_keys_and_values_from_pages(name: str, scattered: bool, tmp_path: Path) -> None:
    span, hidden = span_of(name, tmp_path)
    pool = PagePool.for_span(span, hidden, pages=12)
    if scattered:
        for page in [pool.pages.take() for _ in range(12)][::-2]:
            pool.pages.give_back(page)  # every other one
    for rows in (1, 2):
        plain, cache = span.new_cache(), pool.new_cache(span.start, span.end, sum(CHUNKS))
        for number, count in enumerate(CHUNKS):
            new = states(rows, count, hidden, seed=number)
            torch.testing.assert_close(run(span, cache, new), span.forward(new, plain), atol=1e-4, rtol=1e-4)
        cache.release()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "bloom"])
def test_beams_share_pages_until_they_write(name: str, tmp_path: Path) -> None:
    span, hidden = span_of(name, tmp_path)
    pool = PagePool.for_span(span, hidden, pages=4 * 3)
    plain, cache = span.new_cache(), pool.new_cache(span.start, span.end, 40)
    prompt = states(1, 2 * PAGE + 3, hidden)
    torch.testing.assert_close(run(span, cache, prompt), span.forward(prompt, plain), atol=1e-4, rtol=1e-4)
    for number, rows in enumerate([[0, 0, 0, 0], [3, 1, 1, 0], [2, 2, 2, 3], [0, 2]]):
        plain.reorder_cache(torch.tensor(rows))
        cache.reorder_cache(torch.tensor(rows))
        new = states(len(rows), 1, hidden, seed=number)
        torch.testing.assert_close(run(span, cache, new), span.forward(new, plain), atol=1e-4, rtol=1e-4)
        assert pool.pages.used == 2 + len(rows), "the full pages are shared, the last one is not"
    cache.release()
    assert pool.pages.used == 0


def test_rolling_back_into_a_shared_page_leaves_it_to_the_others(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=8)
    caches = [pool.new_cache(span.start, span.end, 40) for _ in range(2)]
    prompt, other, last = states(1, 40, hidden), states(1, 30, hidden, seed=1), states(1, 1, hidden, seed=2)
    for cache in caches:
        run_and_remember(span, cache, prompt)
    assert pool.pages.used == 2 + 2
    caches[0].roll_back(10)
    found = run(span, caches[0], other)
    plain = span.new_cache()
    expected = span.forward(torch.cat([prompt[:, :10], other], dim=1), plain)
    torch.testing.assert_close(found, expected[:, 10:], atol=1e-4, rtol=1e-4)
    plain = span.new_cache()
    span.forward(prompt, plain)
    torch.testing.assert_close(run(span, caches[1], last), span.forward(last, plain), atol=1e-4, rtol=1e-4)


def test_prompts_that_begin_alike_are_computed_once(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=20)
    system, tails = states(1, 3 * PAGE + 5, hidden), [states(1, 20, hidden, seed=seed) for seed in (1, 2)]
    outputs, done = [], []
    for tail in tails:
        prompt = torch.cat([system, tail], dim=1)
        cache = pool.new_cache(span.start, span.end, 100)
        output, reused = run_and_remember(span, cache, prompt)
        outputs.append(output)
        done.append(reused)
        torch.testing.assert_close(output, span.forward(prompt, span.new_cache()), atol=1e-4, rtol=1e-4)
    assert done == [0, 3 * PAGE]
    assert torch.equal(outputs[0][:, : 3 * PAGE], outputs[1][:, : 3 * PAGE])


@pytest.mark.parametrize("pieces", [(7, 50, 7), (40, 24), (16, 1, 1, 46)])
def test_pieces_of_any_length_find_what_is_known(pieces: tuple[int, ...], llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=20)
    prompt, new = states(1, sum(pieces), hidden), states(1, 1, hidden, seed=1)
    expected, _ = run_and_remember(span, pool.new_cache(span.start, span.end, 100), prompt)
    cache = pool.new_cache(span.start, span.end, 100)
    outputs, computed = [], 0
    for piece in prompt.split(list(pieces), dim=1):
        output, reused = run_and_remember(span, cache, piece)
        outputs.append(output)
        computed += piece.shape[1] - reused
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert computed <= pieces[0] + 3 * PAGE and computed < sum(pieces)
    plain = span.new_cache()
    span.forward(prompt, plain)
    torch.testing.assert_close(run(span, cache, new), span.forward(new, plain), atol=1e-4, rtol=1e-4)
    cache.release()
    assert pool.pages.used == 4


def test_what_was_generated_is_known_when_the_conversation_comes_back(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=20)
    whole = states(1, 3 * PAGE, hidden)
    first = pool.new_cache(span.start, span.end, 100)
    outputs = [run_and_remember(span, first, whole[:, :20])[0]]
    outputs += [run_and_remember(span, first, whole[:, at : at + 1])[0] for at in range(20, 3 * PAGE)]
    first.release()
    assert pool.pages.used == 0 and pool.pages.remembered == 3
    again = pool.new_cache(span.start, span.end, 100)
    output, reused = run_and_remember(span, again, whole)
    assert reused == 3 * PAGE and torch.equal(output, torch.cat(outputs, dim=1))
    new = states(1, 1, hidden, seed=5)
    plain = span.new_cache()
    span.forward(whole, plain)
    torch.testing.assert_close(run(span, again, new), span.forward(new, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["states", "order", "position ids", "blocks", "sequences"])
def test_nothing_else_is_taken_for_known(what: str, llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=20)
    prompt = states(1, 2 * PAGE, hidden)
    run_and_remember(span, pool.new_cache(span.start, span.end, 40), prompt)
    cache = pool.new_cache(span.start, span.end, 40)
    assert cache.reuse(prompt, None) is not None
    cache.release()
    ids = None
    if what == "states":
        prompt = prompt.clone()
        prompt[0, 3, 7] += 1e-6
    elif what == "order":
        prompt = prompt.roll(PAGE, dims=1)
    elif what == "position ids":
        ids = torch.arange(2 * PAGE).unsqueeze(0) + 1
    elif what == "blocks":
        cache = pool.new_cache(span.start, span.end - 1, 40)
    else:
        prompt = torch.cat([prompt, states(1, 2 * PAGE, hidden, seed=9)])
    assert cache.reuse(prompt, ids) is None


def test_position_ids_that_say_nothing_new_are_known(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=4)
    prompt = states(1, PAGE, hidden)
    run_and_remember(span, pool.new_cache(span.start, span.end, PAGE), prompt)
    assert pool.new_cache(span.start, span.end, PAGE).reuse(prompt, torch.arange(PAGE).unsqueeze(0)) is not None


def test_what_was_rolled_back_is_not_remembered_as_what_followed(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=20)
    cache = pool.new_cache(span.start, span.end, 100)
    old, new = states(1, PAGE + 8, hidden), states(1, 2 * PAGE, hidden, seed=1)
    run_and_remember(span, cache, old)
    for position in (PAGE + 4, PAGE, 6):  # within the page that is not full yet, between two, and within a full one
        cache.roll_back(position)
        whole = torch.cat([old[:, :position], new], dim=1)
        output, _ = run_and_remember(span, cache, new)
        expected = span.forward(whole, span.new_cache())[:, position:]
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        cache.roll_back(position)
        output, reused = run_and_remember(span, cache, new)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        assert reused == (2 * PAGE if position == PAGE else 0)
        other = pool.new_cache(span.start, span.end, 100)
        found, _ = run_and_remember(span, other, whole)
        torch.testing.assert_close(found[:, position:], expected, atol=1e-4, rtol=1e-4)
        other.release()


def test_a_full_pool_forgets_what_nobody_uses(llama: tuple[Span, int]) -> None:
    span, hidden = llama
    pool = PagePool.for_span(span, hidden, pages=4)
    for seed in range(5):
        cache = pool.new_cache(span.start, span.end, 3 * PAGE)
        prompt = states(1, 3 * PAGE, hidden, seed=seed)
        output, _ = run_and_remember(span, cache, prompt)
        torch.testing.assert_close(output, span.forward(prompt, span.new_cache()), atol=1e-4, rtol=1e-4)
        cache.release()
    assert pool.pages.remembered <= 4 and pool.pages.used == 0
