# SPDX-License-Identifier: Apache-2.0
"""Weights of single modules, read from a checkpoint's shards into a model that was built without any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.prune.models.deepseek import register_deepseek_model

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HALVES = {"w1": 0, "w3": 1}  # gate_proj and up_proj inside a stacked gate_up_proj


def empty_model(checkpoint: Checkpoint, dtype: str = "auto") -> PreTrainedModel:
    """Builds the checkpoint's causal language model for evaluation: parameters on the meta device, buffers computed.

    `dtype` is a torch dtype name; "auto" is the dtype in config.json, or that of the first weight. Raises HeaprError if
    transformers does not know the model, or without `accelerate`.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise HeaprError(f"streaming and FP8 need the `accelerate` package: {install_command('prune')}") from error
    register_deepseek_model()
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=run_dtype(checkpoint, dtype), trust_remote_code=False
            )
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise HeaprError(f"transformers cannot build {checkpoint.path}: {first_line(error)}") from error
    return model.eval().requires_grad_(False)


def load_dequantized(checkpoint: Checkpoint, dtype: str, device: torch.device | str) -> PreTrainedModel:
    """Loads the whole model on `device`, FP8 weights dequantised, which `from_pretrained` does on some GPUs only."""
    model = empty_model(checkpoint, dtype)
    ModuleWeights(checkpoint, model, device).load("")
    model.tie_weights()
    return model.to(device)


def run_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """Finds the dtype the model computes in."""
    text = checkpoint.text
    if dtype == "auto":
        dtype = (
            text.dtype
            or text.torch_dtype
            or next(_FLOATS[stored] for stored, _ in checkpoint.headers.values() if stored in _FLOATS)
        )
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise HeaprError(f"{checkpoint.path / 'config.json'} names the dtype {dtype}, which torch does not know")
    return found


def model_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Maps tensor name in the checkpoint -> name of the parameter that it fills, or a part of which it fills.

    What Transformers does while it loads; like there, `model` remembers it for `save_pretrained`.
    """
    conversions, parameters = get_model_conversion_mapping(model), model.state_dict()
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    found: dict[str, str] = {}
    for name in names:
        found[name], _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
    used = [conversion for conversion in conversions if conversion.was_used()]
    setattr(model, "_weight_conversions", used)  # noqa: B010 - torch types attributes of modules as tensors
    return found


class ModuleWeights:
    """Reads the weights of one module of `model` at a time.

    Experts may be stored one by one or stacked; every tensor is copied straight into its place, so a module needs its
    own size plus one tensor.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device | str) -> None:
        """Raises HeaprError if the checkpoint lacks a weight of the model or has one of another shape."""
        self.checkpoint, self.model, self.device = checkpoint, model, torch.device(device)
        self.sources: dict[str, list[tuple[str, ExpertTensor | None]]] = defaultdict(list)
        for name, target in model_names(model, checkpoint.weight_map).items():
            where = ExpertTensor.parse(name)
            self.sources[target].append((name, where if where and where.expert is not None else None))
        for name, tensor in model.state_dict().items():
            self._check(name, tensor)

    @contextmanager
    def resident(self, prefix: str) -> Generator[None]:
        """Gives the module named `prefix` its weights, and empties it again on exit."""
        self.load(prefix)
        try:
            yield
        finally:
            module = self.model.get_submodule(prefix)
            module.load_state_dict(
                {name: tensor.to("meta") for name, tensor in module.state_dict().items()}, assign=True
            )

    def load(self, prefix: str) -> None:
        """Gives the module named `prefix` its weights; "" is the whole model."""
        module = self.model.get_submodule(prefix)
        tensors: dict[str, torch.Tensor] = {}
        with TensorReader(self.checkpoint, torch.float32) as reader:
            for name, empty in module.state_dict().items():
                tensor = torch.empty(empty.shape, dtype=self._dtype(name, empty), device=self.device)
                tensors[name] = tensor
                for source, where in self._sources(f"{prefix}.{name}".lstrip(".")):
                    self._place(tensor, where).copy_(reader.tensor(source))
        module.load_state_dict(tensors, assign=True)

    def _sources(self, name: str) -> list[tuple[str, ExpertTensor | None]]:
        return self.sources.get(name) or self.sources.get(self.model.all_tied_weights_keys.get(name, ""), [])

    def _place(self, tensor: torch.Tensor, where: ExpertTensor | None) -> torch.Tensor:
        """Selects the part of a module's tensor that one tensor of the checkpoint fills."""
        if where is None:
            return tensor
        place = tensor[where.expert]
        return place.chunk(2)[_HALVES[where.shard]] if where.shard in _HALVES else place

    def _dtype(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        """As `from_pretrained` decides: what the model computes in, float32 for the few tensors that insist on it."""
        strict = self.model._keep_in_fp32_modules_strict or ()
        return torch.float32 if set(name.split(".")) & set(strict) else tensor.dtype

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        filled = 0
        for source, where in self._sources(name):
            shape, wanted = self.checkpoint.headers[source][1], tuple(self._place(tensor, where).shape)
            if shape != wanted:
                raise HeaprError(
                    f"{self.checkpoint.path}: {source} is {list(shape)}, {type(self.model).__name__} has "
                    f"{list(wanted)}; this family is not supported here"
                )
            filled += torch.Size(shape).numel()
        if filled != tensor.numel():
            raise HeaprError(f"{self.checkpoint.path} lacks weights of {name}; download the checkpoint again")
