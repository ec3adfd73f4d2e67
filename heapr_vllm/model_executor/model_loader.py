# SPDX-License-Identifier: Apache-2.0
"""`--load-format heapr`: serves a masks repository by streaming its base model's weights.

The parameters of pruned experts slice every tensor as it arrives, so no full-size expert is ever kept.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator
from pathlib import Path

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import FP8_SCALE_SUFFIX
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import SCALE_SUFFIX
from heapr_vllm.model_executor.base_model import BASE_MODEL_KEY, base_checkpoint, check_base
from heapr_vllm.model_executor.quantization import HeaprConfig


class HeaprModelLoader(DefaultModelLoader):
    """vLLM's default loader, pointed at the base model.

    `--model-loader-extra-config '{"base_model": "/path/or/repo"}'` overrides where the masks say it is.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config)
        self.base_override: str | None = extra.pop(BASE_MODEL_KEY, None)
        extra.setdefault("enable_weights_track", True)  # off by default for quantized models: every tensor must come
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
        configs = (getattr(module, "quant_config", None) for module in model.modules())
        config = next(c for c in configs if isinstance(c, HeaprConfig))
        check_base(Checkpoint.resolve(source.model), config.masks, config.pruning)
        for name, tensor in super().get_all_weights(source, model):
            # vLLM holds on to a tensor of the attention until the next layer's: a copy lets go of the mapped shard
            is_expert = ExpertTensor.parse(name.removesuffix(FP8_SCALE_SUFFIX).removesuffix(SCALE_SUFFIX))
            yield name, tensor if is_expert else tensor.clone()
