# SPDX-License-Identifier: Apache-2.0
"""Quantized siblings of tiny models, in the formats that base models are published in."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file

from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import Checkpoint
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
GROUP = {"group_size": BLOCK}  # 128 in most released models
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "lm_head": False, **GROUP}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", **GROUP}
W4A16 = {"type": "int", "strategy": "group", "num_bits": 4, **GROUP}
FOUR_BITS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-linears": GPTQ,
    "awq": AWQ,
    "awq-linears": AWQ,
    "w4a16": W4A16,
    "w4a16-asymmetric": {**W4A16, "symmetric": False},
    "w4a16-linears": W4A16,
}
FORMATS |= FOUR_BITS
CODES = (torch.int8, torch.float8_e4m3fn, torch.int32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in the next bits of an int32: AutoAWQ's packer


def block(name: str, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of a format of FORMATS in which modules called as `ignore` are as they were."""
    weights = FORMATS[name]
    if weights.get("quant_method") == "gptq":
        return dict(weights)
    if "quant_method" in weights:
        return {**weights, "modules_to_not_convert": ignore}
    arguments = {"num_bits": 8, "symmetric": True, "dynamic": False} | weights
    activations = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": activations if arguments["num_bits"] == 8 else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{weights['type']}-quantized" if arguments["num_bits"] == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantized(plain: Path, folder: Path, name: str, *, excluded: str = "nothing") -> Path:
    """Writes the sibling of a tiny model whose experts, or all linear layers, are codes of a format of FORMATS.

    Tensors whose name starts with `excluded` stay as they are.
    """
    shutil.copytree(plain, folder)
    tensors, ignored = {}, []
    for key, tensor in load_file(plain / "model.safetensors").items():
        is_linear = re.fullmatch(LINEARS if name.endswith("linears") else EXPERTS, key) is not None
        if not is_linear or key.startswith(excluded):
            ignored.append(key.removesuffix(".weight"))
            tensors[key] = tensor
            continue
        tensors |= stored(key, tensor, name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": block(name, ignored)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantized(sibling: Path, folder: Path) -> Path:
    """Writes the model with its experts in float32, exactly as their codes and scales say.

    down_proj of 4 bits as it is served: rounded to 8 bits in groups along H.
    """
    shutil.copytree(sibling, folder)
    config = json.loads((sibling / "config.json").read_text())
    written = config.pop("quantization_config")
    is_of_4_bits = BaseQuantization.from_config(written, str(sibling)).packing is not None
    tensors = load_file(sibling / "model.safetensors")
    ignored = []
    for key, value in values(sibling).items():
        if re.fullmatch(EXPERTS, key) and _parts(key, tensors):
            for part in _parts(key, tensors):
                del tensors[part]
            tensors[key] = _in_8_bits(value) if is_of_4_bits and "down_proj" in key else value
            ignored.append(key.removesuffix(".weight"))
    if any(key.endswith("qzeros") for key in tensors) and written["quant_method"] == "gptq":
        config["quantization_config"] = _from_gptq(tensors)
    elif any(tensor.dtype in CODES for tensor in tensors.values()):
        config["quantization_config"] = _without_experts(written, ignored)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def values(sibling: Path) -> dict[str, torch.Tensor]:
    """All weights of a sibling, codes in float32: decoded bit by bit and entry by entry, or by compressed-tensors."""
    config = Checkpoint(sibling).quantization
    base = BaseQuantization.from_config(config, str(sibling))
    tensors = load_file(sibling / "model.safetensors")
    found = {}
    for module in {key.rpartition(".")[0] for key in tensors if tensors[key].dtype in CODES}:
        parts = {part.removeprefix(f"{module}."): tensors.pop(part) for part in _parts(f"{module}.weight", tensors)}
        if base.packing is None:
            codes, scale = parts["weight"].float(), parts["weight" + base.scale_suffix]
            height, width = base.blocks or (1, codes.shape[1])
        else:
            codes, scale = _DECODED[config["quant_method"]](parts)
            height, width = 1, config.get("group_size", BLOCK)
        rows, columns = torch.arange(len(codes)) // height, torch.arange(codes.shape[1]) // width
        found[f"{module}.weight"] = (codes.float() * scale.float()[rows][:, columns]).contiguous()
    return tensors | found


def stored(key: str, weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Codes and scales of a weight in a format of FORMATS, by the names of their tensors."""
    if name not in FOUR_BITS:
        scheme = BaseQuantization.from_config(block(name, []), name)
        codes, scale = _round(weight, scheme)
        return {key: codes, key + scheme.scale_suffix: scale}
    is_symmetric = FOUR_BITS[name].get("sym", FOUR_BITS[name].get("symmetric", "awq" not in name))
    codes, zeros, scale = _round_to_4_bits(weight, is_symmetric)
    module = key.removesuffix(".weight")
    if "w4a16" in name:
        parts = {
            "weight_packed": pack_to_int32((codes - 8).to(torch.int8), 4),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not is_symmetric:
            parts["weight_zero_point"] = pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0).contiguous()
    elif "awq" in name:
        parts = {"qweight": _pack(codes.T, AWQ_ORDER), "qzeros": _pack(zeros.T, AWQ_ORDER), "scales": scale.T}
    else:
        parts = {"qweight": _pack(codes).T, "qzeros": _pack(zeros.T - 1), "scales": scale.T}
        parts["g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // BLOCK
    return {f"{module}.{part}": tensor.clone(memory_format=torch.contiguous_format) for part, tensor in parts.items()}


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


def _round_to_4_bits(weight: torch.Tensor, is_symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [O, I], zero points and float16 scales [O, ceil(I / BLOCK)] of a weight."""
    groups = -(-weight.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(weight, (0, groups * BLOCK - weight.shape[1])).unflatten(1, (groups, BLOCK))
    low, high = padded.amin(-1), padded.amax(-1)
    scale = (padded.abs().amax(-1) / 7.5 if is_symmetric else (high - low) / 15).clamp(min=1e-4).half()
    zeros = torch.full(scale.shape, 8) if is_symmetric else (-low / scale.float()).round().clamp(0, 15).int()
    codes = (padded / scale.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 15).int().flatten(1)[:, : weight.shape[1]], zeros.int(), scale


def _pack(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Puts eight neighbours along the last axis into an int32, from the lowest bits on those that `order` names."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for place, neighbour in enumerate(order):
        packed |= codes[:, neighbour::8].int() << 4 * place
    return packed


def _unpack(packed: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Inverts `_pack`."""
    codes = torch.zeros(packed.shape[0], packed.shape[1] * 8, dtype=torch.int32)
    for place, neighbour in enumerate(order):
        codes[:, neighbour::8] = packed >> 4 * place & 15
    return codes


def _of_groups(zeros: torch.Tensor, inputs: int) -> torch.Tensor:
    """Zero points [O, G] of every input [O, I]."""
    return zeros[:, torch.arange(inputs) // BLOCK]


def _decoded_gptq(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _unpack(parts["qweight"].T)
    zeros = _unpack(parts["qzeros"]).T + 1
    return codes - _of_groups(zeros, codes.shape[1]), parts["scales"].T


def _decoded_awq(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, zeros = _unpack(parts["qweight"], AWQ_ORDER).T, _unpack(parts["qzeros"], AWQ_ORDER).T
    return codes - _of_groups(zeros, codes.shape[1]), parts["scales"].T


def _decoded_w4a16(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = torch.Size(parts["weight_shape"].tolist())
    codes, scale = unpack_from_int32(parts["weight_packed"], 4, shape).int(), parts["weight_scale"]
    if "weight_zero_point" in parts:
        zeros = unpack_from_int32(parts["weight_zero_point"], 4, scale.shape, packed_dim=0).int()
        codes = codes - _of_groups(zeros, codes.shape[1])
    return codes, scale


_DECODED = {"gptq": _decoded_gptq, "awq": _decoded_awq, "compressed-tensors": _decoded_w4a16}


def _parts(key: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that hold a weight as codes; none if it is in floating point."""
    module = key.removesuffix("weight")
    found = [name for name in tensors if name.startswith(module) and "." not in name.removeprefix(module)]
    return found if any(tensors[name].dtype in CODES for name in found) else []


def _in_8_bits(down: torch.Tensor) -> torch.Tensor:
    scheme = ExpertScheme(group_size=BLOCK)
    return scheme.dequantize(*scheme.quantize(down, "w2"), "w2")


def _without_experts(written: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` for a model whose experts, called as `ignored`, are in floating point."""
    if written["quant_method"] == "awq":
        return {**written, "modules_to_not_convert": [*written["modules_to_not_convert"], ".experts"]}
    return {**written, "ignore": [*written["ignore"], *ignored]}


def _from_gptq(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Makes GPTQ's tensors those of compressed-tensors, in place, and returns the `quantization_config`.

    Stock vLLM does not run a GPTQ model with other experts on CPUs.
    """
    for module in [key.removesuffix(".qzeros") for key in tensors if key.endswith(".qzeros")]:
        parts = {name: tensors.pop(f"{module}.{name}") for name in ("qweight", "scales", "qzeros", "g_idx")}
        packed, scale = parts["qweight"].T.contiguous(), parts["scales"].T.contiguous()
        shape = torch.tensor([packed.shape[0], packed.shape[1] * 8])
        tensors |= {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, f"{module}.weight_shape": shape}
    ignored = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    return block("w4a16-linears", ignored)


def same_bits(codes: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether codes are of one type and equal, NaN or not."""
    return codes.dtype == wanted.dtype and torch.equal(codes.view(BITWISE), wanted.view(BITWISE))
