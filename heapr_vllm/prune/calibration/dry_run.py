# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk a streamed calibration needs, from shapes alone."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.sizes import dequantized_bytes, tensor_bytes
from heapr_vllm.prune.calibration.collector import ROWS_AT_ONCE, MomentCollector
from heapr_vllm.prune.calibration.settings import CalibrationSettings, calibration_samples
from heapr_vllm.prune.models.layered import HEAD_TOKENS, LayeredModel
from heapr_vllm.prune.models.loading import check_device
from heapr_vllm.prune.text.batches import Batch
from heapr_vllm.prune.text.sources import parse_sources

RUNTIME_BYTES = 256 * 2**20  # kernel libraries, thread stacks and allocator rounding that come with the first step


def streamed_plan(model: LayeredModel, batches: list[Batch]) -> dict[str, int]:
    """Computes sizes in bytes for these batches, an upper bound for every phase of the pass.

    `peak_memory_bytes` is that of the device the layers run on; on the CPU it includes what this process holds now.
    """
    weights = {name: _weight_bytes(model, name) for name in (*model.layer_names, model.embedding_name, model.head_name)}
    layer_weights = max(weights[name] for name in model.layer_names)
    shapes = {tuple(batch.ids.shape) for batch in batches}
    dtype = next(model.model.parameters()).dtype
    config = model.model.config.get_text_config()
    hidden = max(rows * length for rows, length in shapes) * config.hidden_size * dtype.itemsize
    activations = max(_activation_bytes(model, layer, *shape) for layer, shape in product(model.layers, shapes))
    head_tokens = max(rows * min(max(1, HEAD_TOKENS // rows), length) for rows, length in shapes)
    logits = head_tokens * config.vocab_size * (2 * dtype.itemsize + 3 * 4)  # as computed, float32, softmax, gradients
    collector = MomentCollector(model.model, torch.device("meta"))
    sources = 1 + max(batch.source for batch in batches)
    accumulators = sources * sum(layer.nbytes for layer in collector.layers.values())
    phases = (
        weights[model.embedding_name] + 2 * hidden,
        weights[model.head_name] + logits + 4 * hidden,
        layer_weights + activations + 4 * hidden,
    )
    process = peak_resident_bytes() if model.device.type == "cpu" else 0
    one_tensor = _tensor_in_flight_bytes(model.weights.checkpoint)
    kept_layers = len(model.layers) - model.first_moe_layer + 1
    return {
        "layer_weight_bytes": layer_weights,
        "embedding_bytes": weights[model.embedding_name],
        "head_bytes": weights[model.head_name],
        "tensor_in_flight_bytes": one_tensor,
        "logits_bytes": logits,
        "layer_activation_bytes": activations,
        "accumulator_bytes": accumulators,
        "process_bytes": process,
        "peak_memory_bytes": process + RUNTIME_BYTES + 2 * accumulators + one_tensor + max(phases),
        "disk_bytes": sum(batch.ids.numel() for batch in batches)
        * config.hidden_size
        * dtype.itemsize
        * (kept_layers + 2),
    }


def peak_resident_bytes(process: int | str = "self") -> int:
    """Reads the most memory a process has had so far; 0 where the system does not say (it is Linux that does)."""
    status = Path(f"/proc/{process}/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(match[1]) * 1024 if match else 0


def _weight_bytes(model: LayeredModel, name: str) -> int:
    return sum(tensor.nbytes for tensor in model.model.get_submodule(name).state_dict().values())


def _activation_bytes(model: LayeredModel, layer: nn.Module, batch: int, length: int) -> int:
    """Estimates what one layer keeps for its backward pass, and the largest temporaries of that pass."""
    size, tokens = next(layer.parameters()).dtype.itemsize, batch * length
    config = model.model.config.get_text_config()
    wide = 3 * 4 + 3 * size  # float32 copies inside norms and rotary embeddings, results in the model's dtype
    linear = sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
    total = tokens * (linear + 4 * config.hidden_size) * wide
    total += batch * config.num_attention_heads * length * length * (2 * 4 + size) * _keeps_attention(config)
    for module in model.experts_of(layer).values():
        experts, _, width = module.down_proj.shape
        rows = tokens * getattr(config, "num_experts_per_tok", experts)
        total += rows * 5 * width * size + tokens * 3 * 4 * config.hidden_size  # as `MomentCollector.forward` says
        total += min(rows, ROWS_AT_ONCE) * (config.hidden_size * (2 * size + 4) + width * (2 * size + 4 * 8))
    return total


def _keeps_attention(config: PretrainedConfig) -> bool:
    """Tells whether attention weights [L, L] are kept: kernels that avoid it need heads of one size."""
    sizes = {getattr(config, "v_head_dim", None), getattr(config, "qk_head_dim", None)}
    return config._attn_implementation == "eager" or len(sizes) > 1


def _tensor_in_flight_bytes(checkpoint: Checkpoint) -> int:
    """Computes the largest tensor while it is read; codes pass through float32, and so do their scales."""
    of_4_bits = max((tensor_bytes(checkpoint, name) for name in checkpoint.packed), default=0)
    largest = max(tensor_bytes(checkpoint, name) for name in checkpoint.headers)
    return max(largest * (1 if checkpoint.base_quantization is None else 9), of_4_bits * 20)


def plan(settings: CalibrationSettings, device: str = "cpu") -> dict[str, Any]:
    """Computes the sizes of `--dry-run` by formula from the config and the shard headers; no large weight is loaded.

    With `settings.stream` also the peak memory; the text is read for it, since it counts too. Without, tokens are those
    of samples as long as they may be.
    """
    check_device(device, allow_auto=True)
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unpruned()
    shapes = checkpoint.expert_shapes()
    neurons = sum(experts * width for experts, width in shapes.values())
    sources = len(parse_sources(settings.dataset))
    text = checkpoint.text
    tokens = settings.batch_size * settings.max_seq_length
    scale = 2 if settings.dtype == "float32" and (text.dtype or text.torch_dtype) == "bfloat16" else 1
    sizes = {
        "moe_layers": len(shapes),
        "experts": sum(experts for experts, _ in shapes.values()),
        "neurons": neurons,
        "calibration_tokens": settings.num_calibration_samples * settings.max_seq_length,
        "weight_bytes": dequantized_bytes(checkpoint) * scale,
        "accumulator_bytes": 6 * 8 * neurons * sources,
        "logits_bytes": 2 * 4 * tokens * (text.vocab_size or 0),
        "checkpointed_activation_bytes": 4 * tokens * checkpoint.hidden_size * (text.num_hidden_layers or 0),
        "output_bytes": (3 + 3 * sources) * 4 * neurons,
    }
    if not settings.stream:
        return sizes
    from heapr_vllm.prune.models.layered import LayeredModel

    del sizes["checkpointed_activation_bytes"]  # on disk here
    batches = settings.batches(calibration_samples(settings, checkpoint))
    sizes["calibration_tokens"] = sum(batch.ids.numel() for batch in batches)
    return sizes | streamed_plan(LayeredModel(checkpoint, settings.dtype, device), batches)
