# SPDX-License-Identifier: Apache-2.0
"""Serving options that pruned experts cannot honour yet, refused while the model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.model_executor import compat

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from heapr_vllm.model_executor.pruned_layer import PrunedLayer


RUNTIME_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
OTHER_LOADERS = ("runai_streamer",)  # not based on vLLM's default one, and so not on ours
SELF_DISPATCHING = ("passthrough", "moonep")  # expect kernels that send tokens to ranks, and sum over them, themselves
EXPERT_MODULES = {"experts", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}


def refuse_unsupported(layer: PrunedLayer, config: QuantizationConfig) -> None:
    """Raises HeaprError naming the option and the remedy."""
    vllm_config = get_current_vllm_config()
    lora, load_format = vllm_config.lora_config, vllm_config.load_config.load_format
    targets = getattr(lora, "target_modules", None)
    if vllm_config.parallel_config.enable_eplb:
        raise HeaprError("EPLB moves experts of equal size and pruned experts differ; drop --enable-eplb")
    if current_platform.is_cpu() and vllm_config.parallel_config.data_parallel_size > 1:
        raise HeaprError(
            "vLLM cannot gather the tokens of data-parallel ranks on CPUs, for any MoE model; use "
            "--tensor-parallel-size instead of --data-parallel-size"
        )
    if (backend := vllm_config.parallel_config.all2all_backend) in SELF_DISPATCHING:
        raise HeaprError(
            f"pruned experts do not gather tokens themselves, as the all-to-all backend {backend} wants; "
            "drop --moe-backend, or choose another --all2all-backend"
        )
    if lora is not None and (targets is None or EXPERT_MODULES & set(targets)):
        raise HeaprError(
            "LoRA on pruned experts is not supported; restrict it to attention with "
            "--lora-target-modules q_proj k_proj v_proj o_proj"
        )
    if compat.online_quantization(config) is not None:
        raise HeaprError("online quantization of pruned experts is not supported; drop --quantization-config")
    if load_format in RUNTIME_FORMATS:
        raise HeaprError(
            f"--load-format {load_format} stores weights in a kernel's own layout, which pruned experts "
            "do not support; use auto, safetensors or heapr"
        )
    if load_format == "fastsafetensors" and not current_platform.is_cuda_alike():
        raise HeaprError(
            "--load-format fastsafetensors reads files into a GPU's memory; use auto, safetensors or "
            "runai_streamer here"
        )
    if layer.activation != MoEActivation.SILU or layer.moe_config.has_bias or layer.swiglu_limit is not None:
        raise HeaprError(
            f"pruned experts compute SiLU-gated experts without bias; {layer.layer_name} has activation "
            f"{layer.activation.value}, bias {layer.moe_config.has_bias}, limit {layer.swiglu_limit}"
        )


def refuse_other_loaders(base: BaseQuantization | None) -> None:
    """Raises HeaprError if masks slice codes of 4 bits, `base`, and a loader reads them that leaves them packed."""
    load_format = get_current_vllm_config().load_config.load_format
    if base is not None and base.packing is not None and load_format in OTHER_LOADERS:
        raise HeaprError(
            f"--load-format {load_format} does not unpack a base model of 4 bits; use heapr, or write a checkpoint "
            "with `heapr export`"
        )


def refuse_float32(block: dict[str, Any], prefix: str) -> None:
    """Raises HeaprError in float32 if a linear layer has 4 bits, which vLLM's CPU kernels and Marlin do not run so.

    `block`: `quantization_config` by which vLLM runs the layer called `prefix`.
    """
    if get_current_vllm_config().model_config.dtype != torch.float32:
        return
    if BaseQuantization.from_config(block, prefix).packing is not None:
        raise HeaprError(
            f"{prefix} has weights of 4 bits, which vLLM does not run in float32; pass --dtype bfloat16, or write a "
            "checkpoint with `heapr export --quantize none`"
        )
