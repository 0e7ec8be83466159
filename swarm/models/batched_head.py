"""The head of a distributed model, which makes logits: one reading of its weights serves all threads that wait for it.

For a single token a head reads all of its weights (SmolLM2: 113 MB), and for 16 of them it takes twice as long, if they
are packed (:mod:`swarm.models.packed_linear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swarm.models.combining import Combiner
from swarm.models.draft_head import DraftHead

MOST_ROWS = 4
"""A call with more is run as it is: a prompt, or many beams, make good use of the weights by themselves."""
_MOST_CALLS = 16


class BatchedHead(nn.Linear):
    """A linear layer like any other, but that small calls of several threads run as one.

    It has the weights of the layer that it is made from, under the same names. With gradients, on a device, or under
    autocast it does what that layer would do.
    """

    def __init__(self, head: nn.Linear, draft: DraftHead | None = None) -> None:
        """
        Args:
            draft: of `head`.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)
        self._combined: Combiner[torch.Tensor, torch.Tensor] = Combiner(self._of_all, _MOST_CALLS)
        self._made_from = (head,)  # no part of this module, which would then hold everything twice
        self._draft = draft

    @property
    def draft(self) -> DraftHead | None:
        """Says sooner what is likeliest; None: there is no such thing, or several threads call, which together keep the
        machine busy as it is."""
        return None if self._combined.has_company else self._draft

    def expect(self, thread: int) -> None:
        """See :meth:`Combiner.expect`."""
        self._combined.expect(thread)

    def do_not_expect(self, thread: int) -> None:
        """See :meth:`Combiner.do_not_expect`."""
        self._combined.do_not_expect(thread)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``."""
        if not self._can_be_batched(hidden_states):
            return self._multiply(hidden_states)
        rows = self._combined(hidden_states.reshape(-1, self.in_features))
        return rows.view(*hidden_states.shape[:-1], -1)

    def _can_be_batched(self, hidden_states: torch.Tensor) -> bool:
        """Whether others' calls could run with it; false also for what the layer is going to refuse."""
        return (
            not torch.is_grad_enabled()
            and hidden_states.is_cpu
            and self.weight.is_cpu
            and hidden_states.dtype == self.weight.dtype
            and hidden_states.shape[-1] == self.in_features
            and 0 < hidden_states.numel() <= MOST_ROWS * self.in_features
            and not torch.is_autocast_enabled("cpu")
        )

    def _of_all(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # Whichever thread runs this: ordinary tensors come out, without a graph.
        with torch.inference_mode(False), torch.no_grad():
            rows = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs))
            return self._multiply(rows).split([len(one) for one in inputs])

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        (head,) = self._made_from
        if self.weight is head.weight and self.bias is head.bias:
            return head(rows)  # type: ignore[no-any-return]
        return super().forward(rows)
