"""Which experts of one block should be on one server, if not all can be: needed ones that tokens choose together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.placement.coverage import Floats

Indices = NDArray[np.intp]


def group(count: int, among: Indices, own: Indices, needs: Floats, pairs: Floats | None) -> Indices:
    """`count` of the experts `among`, to be hosted beside `own`; in ascending order.

    Grown from what is there, or else from the neediest: next is always the expert that is chosen together with those
    inside most often, over the root of how often it is chosen together with any, times its need. Without the root, hot
    experts, which go with everything, push out those that belong here; over the whole, rare ones push out the hot.
    (Exchanging members afterwards until the fewest pairs are parted, as Kernighan and Lin do, was tried: it made
    messages more, not fewer.) Without `pairs`: the neediest. Of equals the first.

    Args:
        among: ``[n]``, in ascending order.
        own: of the same block, hosted already.
        needs: ``[experts]``, not negative.
        pairs: ``[experts, experts]``: by how many tokens both were chosen.
    """
    if count >= len(among):
        return among
    if pairs is None:
        return np.sort(among[np.argsort(-needs[among], kind="stable")[:count]])
    weights = pairs[np.ix_(among, among)]
    inside = pairs[np.ix_(among, own)].sum(1)
    scale = needs[among] / np.sqrt(np.maximum(weights.sum(1) + inside, 1e-9))
    is_chosen = np.zeros(len(among), bool)
    for _ in range(count):
        worth = inside * scale if inside.any() else needs[among]
        one = int(np.where(is_chosen, -1.0, worth).argmax())
        is_chosen[one] = True
        inside += weights[one]
    return among[is_chosen]
