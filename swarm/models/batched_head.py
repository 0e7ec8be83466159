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

    def __init__(self, head: nn.Linear, draft: DraftHead | None = None, *, looks_ahead: bool = False) -> None:
        """
        Args:
            draft: of `head`, if that is sooner.
            looks_ahead: let it be asked what is :meth:`likeliest`.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)
        self._combined: Combiner[torch.Tensor, torch.Tensor] = Combiner(self._of_all, _MOST_CALLS)
        self._made_from = (head,)  # no part of this module, which would then hold everything twice
        self._draft, self._looks_ahead = draft, looks_ahead
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None  # of what row, and what

    @property
    def looks_ahead(self) -> bool:
        """Whether to ask what is :meth:`likeliest`. Not while several threads call: together they keep the machine
        busy as it is."""
        return self._looks_ahead and self.weight.is_cpu and not self._combined.has_company

    @torch.no_grad()
    def likeliest(self, row: torch.Tensor) -> int:
        """The output that is, most likely, the greatest for ``[1, inputs]``, with which the next call is about to come.

        Without a draft it is the greatest, and the product is kept for that call.
        """
        if self._draft is not None:
            return self._draft.likeliest(row)
        product = self._multiply(row)
        self._made = row, product
        return int(product.argmax())

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
        rows = hidden_states.reshape(-1, self.in_features)
        made, self._made = self._made, None
        product = made[1] if made is not None and torch.equal(made[0], rows) else self._combined(rows)
        return product.view(*hidden_states.shape[:-1], -1)

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
