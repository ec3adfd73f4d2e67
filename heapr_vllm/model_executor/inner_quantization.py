# SPDX-License-Identifier: Apache-2.0
"""The base model's own quantization, by which vLLM runs everything but pruned experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

if TYPE_CHECKING:
    from torch import nn


class InnerQuantization:
    """vLLM's config for a base model's block, built on first use in every process; it is None for an unquantized base.

    vLLM tells a config how a model's modules are called before it asks for methods: what comes before the first use is
    remembered. packed_modules_mapping: the outer config's.
    """

    def __init__(self) -> None:
        self.config: QuantizationConfig | None = None
        self.mappers: list[Any] = []

    def build(self, block: dict[str, Any] | None, weights: str, revision: str | None) -> None:
        """Builds the config from `quantization_config` of the base model.

        `weights`: folder or Hub id of the weights, whose headers say what is quantized where the block does not.
        """
        if block is None or self.config is not None:
            return
        self.config = get_quantization_config(block["quant_method"]).from_config(dict(block))
        self.config.maybe_update_config(weights, revision=revision)
        for mapper in self.mappers:
            self.config.apply_vllm_mapper(mapper)

    def apply_vllm_mapper(self, mapper: Any) -> None:
        """Passes on how modules are renamed."""
        self.mappers.append(mapper)
        if self.config is not None:
            self.config.apply_vllm_mapper(mapper)

    def method(self, layer: nn.Module, prefix: str, packed_modules: dict[str, list[str]]) -> QuantizeMethodBase | None:
        """Returns how vLLM runs a layer of the base model; None as if it were unquantized."""
        if self.config is None:
            return None
        self.config.packed_modules_mapping = packed_modules
        return self.config.get_quant_method(layer, prefix)
