"""A transformers model whose decoder layers run on the swarm."""

from __future__ import annotations

import atexit
import inspect
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from swarm.client.background import BackgroundLoop
from swarm.client.inference_session import InferenceSession
from swarm.client.network import Network
from swarm.client.remote_layers import RemoteCache, RemoteLayers
from swarm.client.settings import ClientSettings
from swarm.models import Checkpoint, load_shell, open_checkpoint
from swarm.models.batched_head import MOST_ROWS, BatchedHead
from swarm.models.shortcut import Shortcut, shortcut_of
from swarm.protocol.tensors import dtype_name

_DEFAULT_ROOM = 64
"""Positions beyond the first input to ask for, when nobody says how long a session will become."""


class AutoDistributedModelForCausalLM:
    """``from_pretrained`` makes a causal language model whose layers are hosted by the swarm."""

    def __init__(self) -> None:
        raise TypeError("use AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=[…])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        initial_peers: Iterable[str] = (),
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        deadline_s: float = 60.0,
        room_deadline_s: float | None = None,
        peer_timeout_s: float = 2.0,
        chain: bool = True,
        redundancy: int = 1,
        activation_codec: str | None = None,
        allowed_servers: Iterable[str] | None = None,
        blocked_servers: Iterable[str] = (),
        pinned_servers: Iterable[str] = (),
        profile: str | None = None,
        quantization: str | None = None,
        any_precision: bool = False,
        allow_degraded: bool = False,
        allow_untested: bool = False,
        look_ahead: bool = True,
    ) -> Any:
        """Load embeddings, norm and head of `model` here, and leave its layers to the swarm.

        Args:
            model: alias (``smollm2``), directory, .gguf file or Hub id; the same as the servers'.
            initial_peers: multiaddrs through which to join the swarm.
            dtype: precision, here and on the servers used; default: that of the checkpoint.
            device: where the local part lives.
            deadline_s: how long to wait for a server when a block has none.
            room_deadline_s: how long to wait for room when servers are merely full; default: ten times `deadline_s`,
                of which it is no part.
            peer_timeout_s: after how much silence a server counts as dead.
            chain: servers send straight to one another where they can; False: everything passes through here.
            redundancy: 2 keeps a second server of every span up to date, which takes over at once.
            activation_codec: send hidden states as ``"int8"``, ``"bfloat16"`` or ``"float16"``: less to send, and
                not exact any more (:mod:`swarm.protocol.codec`); default: losslessly.
            allowed_servers, blocked_servers: peer ids to use only, or never.
            pinned_servers: peer ids to use wherever they host; that one of them cannot be used is an error.
            profile: choose routes for ``"interactive"``, ``"long prompt"``, ``"batch"`` or ``"training"`` work;
                default: for what each session asks for.
            quantization: use servers with ``"int8"``, ``"nf4"`` or ``"int4"`` weights, and multiply with the head in 8
                bits; default: only unquantized ones.
            any_precision: also use servers of another precision.
            allow_degraded: (mixtures of experts) go on without experts that nobody hosts; outputs are then not the
                model's, and ``session.last_step.degraded`` says so. Default: wait for them, then ExpertsMissing.
            look_ahead: let servers begin with the likeliest token while exact logits are made here
                (:mod:`swarm.client.foresight`); where that is sooner, with a copy of the head in 4 bits.

        Returns:
            An instance of the family's own ``…ForCausalLM`` class (and of :class:`DistributedMixin`).

        Raises:
            CheckpointNotFound, CorruptCheckpoint, UnsupportedFamily: the local part cannot be loaded.
            BootstrapFailed: no initial peer answered.
            ValueError: an argument is not one of those possible.
        """
        checkpoint = open_checkpoint(model, revision=revision, allow_untested=allow_untested)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        precision = dtype if isinstance(dtype, torch.dtype) else checkpoint.default_dtype
        settings = ClientSettings(
            initial_peers=tuple(initial_peers),
            deadline_s=deadline_s,
            room_deadline_s=room_deadline_s,
            peer_timeout_s=peer_timeout_s,
            chain=chain,
            redundancy=redundancy,
            activation_codec=activation_codec,
            allowed_servers=tuple(allowed_servers) if allowed_servers is not None else None,
            blocked_servers=tuple(blocked_servers),
            pinned_servers=tuple(pinned_servers),
            profile=profile,
            quantization=quantization,
            any_precision=any_precision,
            allow_degraded=allow_degraded,
        )
        network = BackgroundLoop.shared().run(Network.join(settings))
        layers = RemoteLayers()
        try:
            loaded = load_shell(
                checkpoint,
                layers,
                dtype=precision,
                device=device,
                model_class=_distributed_class,
                quantized_layers=quantization is not None,
                looks_ahead=look_ahead,
            )
        except BaseException:
            BackgroundLoop.shared().run(network.leave())
            raise
        assert isinstance(loaded, DistributedMixin)
        loaded._attach(checkpoint, network, layers)
        return loaded


class DistributedMixin(PreTrainedModel):
    """What a distributed model has beyond the family's own class."""

    def _attach(self, checkpoint: Checkpoint, network: Network, layers: RemoteLayers) -> None:
        # Plain attributes, not modules or parameters.
        self.__dict__.update(_checkpoint=checkpoint, _network=network, _layers=layers)
        atexit.register(self.disconnect)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the checkpoint."""
        return self._checkpoint.tokenizer()

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """Open a session with room for `max_length` positions; close it, or use it as a context manager.

        ``session.step(hidden_states)`` runs all blocks; ``model.generate(…, session=session)`` goes on with it.
        """
        session = self._network.session(self._checkpoint, dtype_name(self.dtype), max_length)
        return InferenceSession(session, max_length)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own forward; ``past_key_values`` must come from this model.

        Without a cache that the caller keeps, the servers' caches are freed at the end.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("You must specify input_ids or inputs_embeds")
        if kwargs.get("labels") is not None and torch.is_grad_enabled():
            raise NotImplementedError("training through the swarm is not implemented yet; use torch.no_grad()")
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}, but a distributed model's cache is on its "
                "servers: pass what this model returned, or nothing"
            )
        kept = use_cache if use_cache is not None else self.config.use_cache
        length = given.shape[1]
        cache = past_key_values or RemoteCache(
            self.inference_session(max_length=length + (_DEFAULT_ROOM if kept else 0))
        )
        mask = _mask_of_new_positions(attention_mask, length)
        thread, head = threading.get_ident(), self.get_output_embeddings()
        expects = isinstance(head, BatchedHead) and given.shape[0] * length <= MOST_ROWS

        is_one_token = given is input_ids and given.numel() == 1
        shortcut = shortcut_of(self) if expects and is_one_token and head.looks_ahead else None
        foresight = cache.session.foresight
        if shortcut is not None:
            foresight.chosen(int(given))

        def arrived(output: torch.Tensor) -> None:
            if shortcut is not None and foresight.is_trusted and head.looks_ahead:
                self._look_ahead(cache.session, shortcut, output)
            if expects:
                head.expect(thread)

        wanted = self._positions_wanted(length, kwargs)

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            output = cache.session.step(hidden_states, position_ids, mask, wanted=wanted, on_result=arrived)
            if wanted is None:
                return output
            return functional.pad(output, (0, 0, length - wanted, 0))  # the rest is looked at by nobody

        try:
            with self._layers.running(run):
                output = super().forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    inputs_embeds=inputs_embeds,
                    use_cache=kept,
                    **kwargs,
                )
            if shortcut is not None and not foresight.is_trusted:
                foresight.expect(int(output[0].argmax()))
            return output
        finally:
            if expects:
                head.do_not_expect(thread)
            if past_key_values is None and not kept:
                cache.session.close()

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
        """transformers' ``generate()``, with every sampler, beams, streamers, processors and criteria.

        Args:
            session: go on with this session (from :meth:`inference_session`): `inputs` are only the new tokens (and
                ``attention_mask`` is of these alone), and only new tokens are returned after them.
        """
        if session is None:
            return super().generate(inputs, *args, **kwargs)
        before = session.output_ids
        if before is not None:
            # What was generated is no padding, even if it is the token that serves as such.
            new_mask = kwargs.pop("attention_mask", None)
            if new_mask is None and inputs is not None:
                new_mask = torch.ones_like(inputs)
            inputs = before if inputs is None else torch.cat([before, inputs], dim=1)
            past = session.output_mask if session.output_mask is not None else torch.ones_like(before)
            kwargs["attention_mask"] = past if new_mask is None else torch.cat([past, new_mask.to(past)], dim=1)
        if kwargs.get("attention_mask") is not None:
            session.output_mask = kwargs["attention_mask"]
        result = super().generate(inputs, *args, past_key_values=RemoteCache(session), **kwargs)
        sequences = result.sequences if isinstance(result, ModelOutput) else result
        session.output_ids, session.output_mask = sequences, _continued(session.output_mask, sequences)
        new = sequences[:, before.shape[1] if before is not None else 0 :]
        if isinstance(result, ModelOutput):
            result.sequences = new
            return result
        return new

    def _positions_wanted(self, length: int, options: dict[str, Any]) -> int | None:
        """Of how many of the last of `length` positions the results are used; None: of all, or who knows."""
        logits = options.get("logits_to_keep")
        everything = any(
            options.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        few = type(logits) is int and 0 < logits < length and options.get("labels") is None
        return logits if few and not everything else None

    def _look_ahead(self, session: InferenceSession, shortcut: Shortcut, output: torch.Tensor) -> None:
        """Let servers begin with what is likeliest to follow `output`, ``[1, 1, hidden]`` as it left the last block."""
        token, hidden_states = shortcut.likeliest_after(self, output)
        ends = self.generation_config.eos_token_id
        is_last = token in ends if isinstance(ends, list) else token == ends
        if not is_last and session.foresight.expect(token):
            session.step_ahead(hidden_states)

    def _supports_logits_to_keep(self) -> bool:
        """Whether the head can be spared all positions of a prompt but the last: as the family's own class says."""
        return "logits_to_keep" in inspect.signature(super().forward).parameters

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """What transformers takes to be padding, if nobody said; a session remembers it."""
        mask: torch.Tensor = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        if isinstance(cache := model_kwargs.get("past_key_values"), RemoteCache):
            cache.session.output_mask = mask
        return mask

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is about a local cache; a "
                "distributed model's cache is on its servers. Leave it out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RemoteCache(self.inference_session(max_length=max_cache_length))
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def disconnect(self) -> None:
        """Leave the swarm; the model cannot be used afterwards. Happens by itself at exit."""
        atexit.unregister(self.disconnect)
        network = self.__dict__.pop("_network", None)
        if network is not None:
            BackgroundLoop.shared().run(network.leave())


def _distributed_class(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(f"Distributed{family.__name__}", (DistributedMixin, family), {"__module__": __name__})


def _continued(mask: torch.Tensor | None, sequences: torch.Tensor) -> torch.Tensor | None:
    """The mask of a prompt, continued for the `sequences` ``[batch, length]`` that were made of it, some of each."""
    if mask is None:
        return None
    mask = mask.to(sequences.device).repeat_interleave(sequences.shape[0] // mask.shape[0], dim=0)
    new = mask.new_ones(sequences.shape[0], sequences.shape[1] - mask.shape[1])
    return torch.cat([mask, new], dim=1)


def _mask_of_new_positions(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The part of a 2-D attention mask that is about the new positions, as uint8."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            "a distributed model takes attention_mask as [batch, positions] with 0 for padding; "
            f"masks of shape {tuple(attention_mask.shape)} cannot be sent to servers"
        )
    return attention_mask[:, -length:].to(torch.uint8)
