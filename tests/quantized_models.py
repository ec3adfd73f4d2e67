# SPDX-License-Identifier: Apache-2.0
"""Quantized siblings of tiny models, in the formats that base models are published in."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.names import ExpertTensor, is_draft_layer
from heapr_vllm.formats.quantized import BITWISE, LARGEST_CODE, ExpertScheme, dequantize

BLOCK = 32  # 128 in released models, where a tiny model's matrices would be one block
EXPERTS = r".*\.experts\.\d+\.\w+\.weight"
LINEARS = r".*_proj\.weight"  # attention too
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FORMATS: dict[str, dict[str, Any]] = {
    "fp8-block": {**FP8, "weight_block_size": [BLOCK] * 2},
    "fp8-released": {**FP8, "weight_block_size": [128] * 2},
    "fp8-channel": {"type": "float", "strategy": "channel"},
    "int8-channel": {"type": "int", "strategy": "channel"},
    "int8-linears": {"type": "int", "strategy": "channel"},
}


def block(name: str, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of a format of FORMATS in which modules called as `ignore` are as they were."""
    weights = FORMATS[name]
    if "quant_method" in weights:
        return {**weights, "modules_to_not_convert": ignore}
    arguments = {"num_bits": 8, "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights | arguments,
        "input_activations": {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{weights['type']}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantized(plain: Path, folder: Path, name: str) -> Path:
    """Writes the sibling of a tiny model whose experts, or all linear layers, are codes of a format of FORMATS."""
    shutil.copytree(plain, folder)
    tensors, ignored = {}, []
    for key, tensor in load_file(plain / "model.safetensors").items():
        if re.fullmatch(LINEARS if name.endswith("linears") else EXPERTS, key) is None:
            ignored.append(key.removesuffix(".weight"))
            tensors[key] = tensor
            continue
        scheme = BaseQuantization.from_config(block(name, []), name)
        codes, scale = _round(tensor, scheme)
        tensors[key], tensors[key + scheme.scale_suffix] = codes, scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": block(name, ignored)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantized(sibling: Path, folder: Path) -> Path:
    """Writes the model with its experts in float32, exactly as their codes and scales say."""
    shutil.copytree(sibling, folder)
    config = json.loads((sibling / "config.json").read_text())
    stored = config.pop("quantization_config")
    scheme = BaseQuantization.from_config(stored, str(sibling))
    tensors = load_file(sibling / "model.safetensors")
    ignored = []
    for key in [key for key in tensors if re.fullmatch(EXPERTS, key) and key + scheme.scale_suffix in tensors]:
        scale = tensors.pop(key + scheme.scale_suffix)
        tensors[key] = dequantize(tensors[key], scale, scheme.block(tuple(tensors[key].shape)))
        ignored.append(key.removesuffix(".weight"))
    if any(key.endswith(scheme.scale_suffix) for key in tensors):
        stored["ignore"] += ignored
        config["quantization_config"] = stored
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rounded(plain: Path, folder: Path, scheme: ExpertScheme) -> Path:
    """Writes the model with the values that its experts have once they are stored as `scheme` says."""
    shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    for key in filter(re.compile(EXPERTS).fullmatch, tensors):
        where = ExpertTensor.parse(key)
        if not is_draft_layer(where.prefix, json.loads((plain / "config.json").read_text())["num_hidden_layers"]):
            codes, scale = scheme.quantize(tensors[key], where.shard)
            tensors[key] = scheme.dequantize(codes, scale, where.shard)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _round(weight: torch.Tensor, scheme: BaseQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] and scales of a weight, rounded as base models are: -128 is a code of INT8 too."""
    rows, columns = scheme.block(tuple(weight.shape))
    padded = torch.zeros(-(-weight.shape[0] // rows) * rows, -(-weight.shape[1] // columns) * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.view(padded.shape[0] // rows, rows, -1, columns).abs().amax((1, 3)) / LARGEST_CODE[scheme.type]
    scale = scale.clamp(min=1e-9)
    codes = weight / dequantize(torch.ones_like(weight), scale, (rows, columns))
    if scheme.type == "float":
        return codes.to(torch.float8_e4m3fn), scale
    return codes.mul(127.5 / 127).round().clamp(-128, 127).to(torch.int8), scale * (127 / 127.5)


def same_bits(codes: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether codes are of one type and equal, NaN or not."""
    return codes.dtype == wanted.dtype and torch.equal(codes.view(BITWISE), wanted.view(BITWISE))
