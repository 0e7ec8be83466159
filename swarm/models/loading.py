"""Build a part of a model and fill it with just the tensors that it needs.

transformers does the work: it makes the whole model on the meta device (no memory), we cut it, and its
loader renames, merges and converts the checkpoint's tensors exactly as it would for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from swarm.errors import CorruptCheckpoint, UnsupportedFamily
from swarm.models.checkpoint import Checkpoint


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The family's ``…ForCausalLM`` class.

    Raises:
        UnsupportedFamily: transformers has none for this configuration.
    """
    try:
        found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedFamily(
            f"{config.model_type} models are not supported: transformers has no causal language model for them."
        ) from None
    return found


def load_part(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    names: Collection[str],
    cut: Callable[[PreTrainedModel], None],
    dtype: torch.dtype,
    device: torch.device | str,
    on_elements: Callable[[int], object],
    model_class: type[PreTrainedModel] | None = None,
    select: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda tensors: tensors,
) -> PreTrainedModel:
    """Make the model, `cut` it, and load the tensors `names` into what is left.

    Args:
        select: given these tensors, not yet read, by their names on disk, says which to load, and as what.

    Raises:
        CorruptCheckpoint: a weight that the part needs is not among `names`, or cannot be read.
    """
    skeleton = make_skeleton(config, cut, model_class)
    part_class = type(skeleton)
    with quiet_transformers():
        try:
            tensors = select(checkpoint.files.lazy_state_dict(names, skeleton))
            state_dict = {key: _ReportsReading(value, on_elements) for key, value in tensors.items()}
            model, info = part_class.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CorruptCheckpoint(f"{checkpoint.location} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        raise CorruptCheckpoint(
            f"{checkpoint.location} is incomplete: it lacks {', '.join(sorted(info['missing_keys'])[:5])}."
        )
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def make_skeleton(
    config: PretrainedConfig,
    cut: Callable[[PreTrainedModel], None],
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model on the meta device (no memory, no values), and `cut`, as every other instance of its class will be."""
    whole_class = model_class or model_class_of(config)

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        with _WithoutCompiler(), no_init_weights():
            whole_class.__init__(self, config)
        cut(self)

    part_class = type(whole_class.__name__, (whole_class,), {"__init__": build, "__module__": whole_class.__module__})
    with torch.device("meta"):
        skeleton: PreTrainedModel = part_class(config)
    return skeleton.eval().requires_grad_(False)


class _WithoutCompiler(TorchFunctionMode):
    """Where tensors are made on the meta device, make number sequences on the CPU.

    Rotary embeddings compute with them, and torch computes on the meta device in Python, for which it imports its
    compiler and SymPy: 70 MB.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.arange, torch.linspace, torch.tensor) and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class _ReportsReading:
    """A lazy tensor that says how many numbers were read once it is."""

    def __init__(self, lazy: Any, on_elements: Callable[[int], object]) -> None:
        self._lazy, self._on_elements = lazy, on_elements

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._lazy[index]
        self._on_elements(tensor.numel())
        return tensor


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading report and progress bar off the terminal: ours says what matters."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Its GGUF reader takes tqdm as it is, which knows nothing of that switch; transformers' own obeys it.
    plain_tqdm, modeling_gguf_pytorch_utils.tqdm = modeling_gguf_pytorch_utils.tqdm, transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = plain_tqdm
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
