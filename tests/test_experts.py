"""Experts apart from their blocks: read alone, computed anywhere, and the same bits come out; whom to ask for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from swarm.dht import State
from swarm.dht.announcement import MAX_RECORD_BYTES
from swarm.dht.expert_announcement import ExpertAnnouncement, bitmaps_of, experts_in, heat_of, tokens_of
from swarm.errors import CorruptCheckpoint
from swarm.models import load_span, open_checkpoint
from swarm.models.experts import HostedExperts, find_expert_tensors, load_experts, routed_experts
from swarm.placement.expert_demand import ExpertDemand
from swarm.routing.experts import ExpertChoice
from swarm.server.experts.asked import HALF_LIFE_S, Asked
from swarm.server.experts.gathering import Ask, Gathering, Latencies
from swarm.server.experts.wanted import WantedExperts, describe

FAMILIES = [
    "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "mixtral", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_moe",
]  # fmt: skip


class InThisProcess:
    """Computes experts at once."""

    def __init__(self, hosted: dict[int, HostedExperts]) -> None:
        self.hosted = hosted

    def begin(
        self, block: int, hidden_states: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        outputs = self.hosted[block].compute(hidden_states[tokens], experts)
        return lambda: outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_without_some_of_their_experts_compute_the_same_bits(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tables = find_expert_tensors(checkpoint)
    assert tables
    whole = load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32)
    hidden_states = torch.randn(2, 7, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = whole.forward(hidden_states, whole.new_cache())
    for here in (set(), {1}, {0, 2, 3}):
        span = load_span(
            checkpoint,
            0,
            checkpoint.num_blocks,
            dtype=torch.float32,
            routed={block: (table, here) for block, table in tables.items()},
        )
        others = {block: set(range(table.count)) - here for block, table in tables.items()}
        hosted = load_experts(checkpoint, tables, others, dtype=torch.float32)
        for routed in routed_experts(span.layers):
            routed.elsewhere = InThisProcess(hosted)
        assert torch.equal(span.forward(hidden_states, span.new_cache()), expected)
        # Nothing is read twice, and nothing that is not hosted.
        assert span.weight_bytes + sum(one.weight_bytes for one in hosted.values()) == whole.weight_bytes


class InOrder(InThisProcess):
    """Tells what happens when."""

    def __init__(self, hosted: dict[int, HostedExperts]) -> None:
        super().__init__(hosted)
        self.happened: list[str] = []

    def begin(
        self, block: int, hidden_states: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        finish = super().begin(block, hidden_states, tokens, experts)
        self.happened.append("asked")

        def answered() -> torch.Tensor:
            self.happened.append("waited")
            return finish()

        return answered


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "qwen2_moe"])
def test_shared_experts_are_computed_once_while_others_compute(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tables = find_expert_tensors(checkpoint)
    split = {block: (table, frozenset[int]()) for block, table in tables.items()}
    span = load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32, routed=split)
    everything = {block: range(table.count) for block, table in tables.items()}
    order = InOrder(load_experts(checkpoint, tables, everything, dtype=torch.float32))
    for routed in routed_experts(span.layers):
        routed.elsewhere = order
    for layer in span.layers:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] == "down_proj" and "shared" in name:
                module.register_forward_hook(lambda *_: order.happened.append("computed"))
    span.forward(torch.randn(2, 3, checkpoint.hidden_size), span.new_cache())
    assert order.happened == ["asked", "computed", "waited"] * len(tables)


def test_a_dense_model_has_no_experts(tiny: str) -> None:
    checkpoint = open_checkpoint(tiny)
    assert find_expert_tensors(checkpoint) == {}
    with pytest.raises(ValueError, match=r"has no routed experts: its blocks are hosted whole, with --blocks"):
        WantedExperts.parse("all").hosted({}, tiny)


def test_a_checkpoint_that_lacks_an_expert_is_damaged(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tables = find_expert_tensors(checkpoint)
    lost = next(name for name, expert in tables[2].expert_of.items() if expert == 3)
    names = {name: expert for name, expert in tables[2].expert_of.items() if name != lost}
    object.__setattr__(tables[2], "expert_of", names)
    with pytest.raises(CorruptCheckpoint):
        load_experts(checkpoint, tables, {2: {3}}, dtype=torch.float32)


# What the owner asks for


def test_what_the_owner_asks_for_is_understood_or_refused_with_a_sentence(tmp_path: Path) -> None:
    save_tiny_model("qwen2_moe", tmp_path)  # block 1 is dense
    tables = find_expert_tensors(open_checkpoint(tmp_path))

    def hosted(text: str) -> dict[int, frozenset[int]]:
        return WantedExperts.parse(text).hosted(tables, "m")

    assert hosted("0:0-1,2:3,0:3") == {0: {0, 1, 3}, 2: {3}}
    assert hosted("*:1") == {0: {1}, 2: {1}, 3: {1}}
    assert hosted("none") == hosted("auto") == {} and WantedExperts.parse("auto").as_many_as_fit
    assert set(hosted("all")[3]) == {0, 1, 2, 3}
    assert describe(hosted("0:0-1,2:3,0:3,3:3")) == "block 0: experts 0–1, 3; blocks 2–3: expert 3"
    for text in ("", "3", "3:", "3:4-1", "a:1", "1:2:3", "3:0-15;4:0", "-1:0"):
        with pytest.raises(ValueError, match="names no experts; write BLOCK:FIRST-LAST"):
            hosted(text)
    with pytest.raises(ValueError, match="block 1 of m has no routed experts; these have: 0, 2–3"):
        hosted("1:0")
    with pytest.raises(ValueError, match="block 2 of m has experts 0 to 3, not 4"):
        hosted("2:2-4")


# What is announced


def saying(hosted: Mapping[int, Collection[int]], heats: Mapping[int, bytes] | None = None) -> ExpertAnnouncement:
    return ExpertAnnouncement(
        peer_id="1" * 52,
        model="ab" * 32,
        state=State.ONLINE,
        bitmaps=bitmaps_of(hosted),
        dtype="bfloat16",
        version="1",
        issued_at=1.0,
        heats=dict(heats or {}),
    )


@given(st.dictionaries(st.integers(0, 200), st.frozensets(st.integers(0, 300), min_size=1), min_size=1, max_size=4))
def test_an_announcement_says_which_experts_are_hosted(hosted: dict[int, frozenset[int]]) -> None:
    bitmaps = bitmaps_of(hosted)
    assert {block: experts_in(bitmap) for block, bitmap in bitmaps.items()} == hosted
    said = saying(hosted)
    assert ExpertAnnouncement.unpack(said.pack()) == said and said.experts == hosted


def test_an_announcement_of_a_large_server_is_small() -> None:
    everything = {block: range(256) for block in range(60)}
    assert len(saying(everything).pack()) < 3000


@given(st.floats(0, 1e9))
def test_how_often_an_expert_was_asked_for_is_told_within_5_percent(tokens: float) -> None:
    assert 1 + tokens_of(heat_of(tokens)) == pytest.approx(1 + tokens, rel=0.05)


def test_what_was_asked_for_is_counted_and_fades() -> None:
    asked = Asked({3: (0, 2, 7), 4: (1,)}, now=100.0)
    asked.count(3, np.array([2, 7, 2, 2]), now=101.0)
    assert [round(tokens_of(heat)) for heat in asked.heats(101.0)[3]] == [0, 3, 1]
    assert asked.heats(101.0).keys() == {3}  # block 4 was not asked for
    asked.count(3, np.array([7] * 400), now=101.5)
    assert tokens_of(asked.heats(101.5 + HALF_LIFE_S)[3][2]) == pytest.approx(200, rel=0.05)


def test_what_a_record_has_no_room_for_is_not_told() -> None:
    large = tuple(range(1024))
    asked = Asked({block: large for block in range(6)}, now=0.0)
    for block in range(6):
        asked.count(block, np.array([5]), now=0.0)
    assert asked.heats(0.0).keys() == set(range(4))
    assert len(saying({block: large for block in range(6)}, asked.heats(0.0)).pack()) < MAX_RECORD_BYTES


def test_what_servers_tell_adds_up_to_what_experts_are_asked_for() -> None:
    here = saying({0: [0, 3], 9: [1]}, {0: bytes([heat_of(7), heat_of(15)]), 9: bytes([heat_of(1)])})
    there = saying({0: [3, 9]}, {0: bytes([heat_of(1), heat_of(3)])})
    demand = ExpertDemand.told([here.tokens_lately, there.tokens_lately], {0: 4})
    assert {block: counts.tolist() for block, counts in demand.chosen.items()} == {0: [7, 0, 0, 16]}
    with pytest.raises(ValueError, match="heats are of other experts"):
        saying({0: [0, 3]}, {0: bytes(3)})
    with pytest.raises(ValueError, match="heats are of other experts"):
        saying({0: [0, 3]}, {1: bytes(2)})


# Whom to ask

HOSTS = st.lists(
    st.builds(
        ExpertChoice,
        st.text("abcdefgh", min_size=1, max_size=2),
        st.frozensets(st.integers(0, 7)),
        st.floats(0, 1),
    ),
    max_size=6,
    unique_by=lambda host: host.peer_id,
)


@given(st.frozensets(st.integers(0, 7), min_size=1), HOSTS, st.data())
def test_whoever_fails_or_is_late_everything_comes_exactly_once_or_is_hopeless(
    needed: frozenset[int], hosts: list[ExpertChoice], data: st.DataObject
) -> None:
    gathering, came = Gathering(needed), list[int]()
    alive = {host.peer_id: host for host in hosts}
    asks: list[Ask] = gathering.ask(hosts)
    while not gathering.is_complete and not gathering.hopeless:
        ask = data.draw(st.sampled_from(asks))
        match data.draw(st.sampled_from(["answers", "answers", "fails", "is late"])):
            case "answers":
                asks.remove(ask)
                came += gathering.answered(ask)
            case "fails":
                alive.pop(ask.peer_id, None)
                for one in [one for one in asks if one.peer_id == ask.peer_id]:
                    asks.remove(one)
                    gathering.failed(one)
                asks += gathering.ask(list(alive.values()))
            case "is late":
                besides = gathering.late(ask, list(alive.values()))
                assert ask.peer_id not in {one.peer_id for one in besides}
                asks += besides
    assert len(came) == len(set(came))
    reachable = frozenset().union(*(host.experts for host in alive.values()))
    if gathering.is_complete:
        assert set(came) == needed
    else:
        assert gathering.hopeless <= needed - set(came) - reachable


def test_late_is_what_takes_twice_as_long_as_usual() -> None:
    latencies = Latencies()
    assert (latencies.usual_s, latencies.late_after_s(1)) == (0.0, 1.0)  # not known yet
    for _ in range(50):
        latencies.add(rows=4, seconds=0.1)
    assert latencies.usual_s == 0.1 and latencies.late_after_s(4) == pytest.approx(0.2)
    assert latencies.late_after_s(1000) == 1.0  # many rows are another matter
    for _ in range(64):
        latencies.add(rows=4, seconds=0.001)
    assert latencies.late_after_s(4) == 0.05
