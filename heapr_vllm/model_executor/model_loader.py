# SPDX-License-Identifier: Apache-2.0
"""How vLLM's default loader reads pruned models: every weight must come, of compact checkpoints and of masks.

`--load-format heapr` serves a masks repository by streaming its base model's weights: the parameters of pruned experts
slice every tensor as it arrives, so no full-size expert is ever kept.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import FP8_SCALE_SUFFIX
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import QUANT_METHOD, PruningConfig
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import SCALE_SUFFIX
from heapr_vllm.model_executor.base_model import BASE_MODEL_KEY, base_checkpoint, check_base
from heapr_vllm.model_executor.quantization import HeaprConfig
from heapr_vllm.model_executor.unpacking import unpacked

BUILT = ("input_scale_ub",)  # parameters that come from a quantization config
WEIGHTS = ("weight", "qweight", "scales", "qzeros")  # what names of weights, codes and their scales start with


class CompleteModelLoader(DefaultModelLoader):
    """vLLM's default loader; of a pruned model every weight must come, as vLLM wants it of unquantized ones.

    vLLM does not look at quantized models, because checkpoints may lack some of their parameters, and it takes a fused
    weight for loaded once a part of it came. `--model-loader-extra-config '{"enable_weights_track": false}'` serves
    what is there.
    """

    pruned_model: str | None = None
    seen: set[str]

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises HeaprError if a pruned model lacks a weight."""
        self.seen = set()
        if model_config.quantization == QUANT_METHOD:
            self.pruned_model = model_config.model
            if self.enable_weights_track is None:
                self.enable_weights_track = True
        super().load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, torch.Tensor]]:
        tensors: Iterator[tuple[str, torch.Tensor]] = super().get_all_weights(model_config, model)
        config = config_of(model)
        if config is not None and config.pruning.layout == "masks":
            base = Checkpoint.resolve(model_config.model, model_config.revision)
            tensors = unpacked(tensors, base, held_experts(model))
        for name, tensor in tensors:
            if self.pruned_model:
                self.seen.add(name)
            yield name, tensor

    def track_weights_loading(
        self, model: nn.Module, loaded_weights: set[str] | None, *args: Any, **kwargs: Any
    ) -> None:
        """`loaded_weights`: the parameters that got something."""
        if self.pruned_model is None:
            super().track_weights_loading(model, loaded_weights, *args, **kwargs)
            return
        modules = {name for name, _ in model.named_modules()}
        missing = set(missing_parts(self.seen, getattr(model, "packed_modules_mapping", {}), modules))
        if loaded_weights is not None:
            missing |= set(needed_parameters(model)) - loaded_weights
        if missing:
            first, *others = sorted(missing)
            more = f" and {len(others)} more weights" if others else ""
            raise HeaprError(f"{self.pruned_model} lacks {first}{more}; export or download it again")


def config_of(model: nn.Module) -> HeaprConfig | None:
    """Finds the config of a pruned model."""
    configs = (getattr(module, "quant_config", None) for module in model.modules())
    return next((config for config in configs if isinstance(config, HeaprConfig)), None)


def held_experts(model: nn.Module) -> dict[str, set[int]]:
    """Lists the pruned experts of which this rank has neurons: prefix in the checkpoint -> ids."""
    from heapr_vllm.model_executor.moe_method import HeaprMoEMethod

    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    return {method.masks.name: method.storage.held for method in methods if isinstance(method, HeaprMoEMethod)}


def missing_parts(names: set[str], fused: dict[str, list[str]], modules: set[str]) -> Iterator[str]:
    """Names the weights that vLLM fuses with one of the checkpoint's `names` and that are not among them.

    `fused`: name of a fused module -> names of its parts; `modules`: of the model, whose outer parts vLLM may have
    renamed. DeepSeek-V2 has a q_proj and a mapping for qkv_proj, but no such module, so both are asked. Experts are
    left out, because storage/ looks after them.
    """
    places = {".".join(module.split(".")[-2:]) for module in modules}
    for name in names:
        if is_expert(name):
            continue
        module_path, _, weight = name.rpartition(".")
        path, _, module = module_path.rpartition(".")
        for whole, parts in fused.items():
            if module in parts and weight.startswith(WEIGHTS) and f"{path.rpartition('.')[2]}.{whole}" in places:
                siblings = (f"{path}.{part}.{weight}" for part in parts)
                yield from (sibling for sibling in siblings if sibling not in names)


def needed_parameters(model: nn.Module) -> Iterator[str]:
    """Names the parameters that a checkpoint must bring.

    The others are scales of the key-value cache, which have defaults, what is quantized while it is loaded, and pruned
    experts, whose storage counts every tensor.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    from heapr_vllm.model_executor.moe_method import HeaprMoEMethod

    free: set[nn.Parameter] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BaseKVCacheMethod | HeaprMoEMethod) or getattr(method, "uses_meta_device", False):
            free.update(module.parameters())
    for name, parameter in model.named_parameters():
        if parameter not in free and parameter.numel() and name.rpartition(".")[2] not in BUILT:
            yield name


def is_expert(name: str) -> bool:
    """Whether a checkpoint's tensor is an expert's weight, or the scales of one."""
    return ExpertTensor.parse(name.removesuffix(FP8_SCALE_SUFFIX).removesuffix(SCALE_SUFFIX)) is not None


class HeaprModelLoader(CompleteModelLoader):
    """vLLM's default loader, pointed at the base model.

    `--model-loader-extra-config '{"base_model": "/path/or/repo"}'` overrides where the masks say it is.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config)
        self.base_override: str | None = extra.pop(BASE_MODEL_KEY, None)
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config=extra))

    def base_model_config(self, model_config: ModelConfig) -> ModelConfig:
        """`model_config` with the base model as its source, unless it names weights itself (`reload_weights`).

        Raises HeaprError if the model is not a masks repository or its base model cannot be read.
        """
        block = getattr(model_config.hf_config, "quantization_config", None) or {}
        if block.get("quant_method") != "heapr" or PruningConfig.from_dict(block).layout != "masks":
            raise HeaprError(f"{model_config.model} is not a masks repository; serve it without --load-format heapr")
        if Path(model_config.model).is_dir() and Checkpoint(Path(model_config.model)).has_weights:
            return model_config
        pruning = PruningConfig.from_dict(block)
        folder = base_checkpoint(model_config.model, model_config.revision, pruning, self.base_override)
        source = copy.copy(model_config)
        source.model, source.revision = str(folder.path), None
        return source

    def download_model(self, model_config: ModelConfig) -> None:
        super().download_model(self.base_model_config(model_config))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, torch.Tensor]]:
        source = self.base_model_config(model_config)
        config = config_of(model)
        assert config is not None, "pruned models have our config"
        check_base(Checkpoint.resolve(source.model), config.masks, config.pruning)
        for name, tensor in super().get_all_weights(source, model):
            # vLLM holds on to a tensor of the attention until the next layer's: a copy lets go of the mapped shard
            yield name, tensor if is_expert(name) else tensor.clone()
