# SPDX-License-Identifier: Apache-2.0
"""Codes and scales: compressed-tensors reads ours, the formats of base models, and what is refused."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as decompress
from compressed_tensors.quantization.lifecycle.forward import quantize as compress

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.quantized import (
    BITWISE,
    PACKED_DTYPE,
    ExpertScheme,
    check_codes,
    check_scale,
    dequantize,
    pack_nibbles,
    unpack_nibbles,
)

SCHEMES = [
    ExpertScheme.for_hidden_size("int8", 256),
    ExpertScheme.for_hidden_size("fp8", 256),
    ExpertScheme.for_hidden_size("int8", 96),
    ExpertScheme.for_hidden_size("int4", 256),
    ExpertScheme(type="float", strategy="channel", group_size=None),
    ExpertScheme(type="int", strategy="channel", group_size=None),
    ExpertScheme(num_bits=4, down_bits=8),
]
WIDTHS = (0, 1, 7, 48)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def matrix(shard: str, width: int, hidden_size: int) -> torch.Tensor:
    shape = (hidden_size, width) if shard == "w2" else (width, hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(width)) * 0.02


def unpacked(codes: torch.Tensor, shard: str) -> torch.Tensor:
    """Codes [O, I], one an element."""
    if codes.dtype != PACKED_DTYPE:
        return codes
    return unpack_nibbles(codes.T).T if shard == "w2" else unpack_nibbles(codes)


def arguments(scheme: ExpertScheme, shard: str) -> QuantizationArgs:
    """How compressed-tensors calls it: a group along H is one along columns, or a block of rows."""
    common = {"num_bits": scheme.of(shard).num_bits, "type": scheme.type, "symmetric": True}
    if scheme.strategy == "channel":
        return QuantizationArgs(strategy="channel", **common)
    if shard == "w2":
        return QuantizationArgs(strategy="block", block_structure=[scheme.group_size, 1], **common)
    return QuantizationArgs(strategy="group", group_size=scheme.group_size, **common)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group_size}")
@pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
def test_compressed_tensors_reads_ours(scheme: ExpertScheme, shard: str) -> None:
    """Codes and values are its own, bit for bit; it is told the scales."""
    hidden_size = scheme.group_size * 3 if scheme.group_size else 256
    for width in filter(None, WIDTHS):
        weight = matrix(shard, width, hidden_size)
        codes, scale = scheme.quantize(weight, shard)
        assert codes.dtype == scheme.of(shard).code_dtype and scheme.weight_shape(shard, codes.shape) == weight.shape
        assert scale.dtype == torch.float32 and tuple(scale.shape) == scheme.scale_shape(shard, tuple(weight.shape))
        ours = scheme.dequantize(codes, scale, shard)
        codes = unpacked(codes, shard)
        args = arguments(scheme, shard)
        assert torch.equal(decompress(codes, scale, args=args), ours)
        theirs = compress(weight, scale, torch.zeros_like(scale), args, dtype=codes.dtype)
        assert torch.equal(theirs.view(BITWISE), codes.view(BITWISE))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group_size}")
@pytest.mark.parametrize("shard", ["w1", "w2"])
def test_rounding_error(scheme: ExpertScheme, shard: str) -> None:
    """Half a step of INT8 is 1/254 of the group's largest value, of E4M3 1/16 of the value itself.

    In 4 bits a step is 1/8 of it, and what is nearer to 8 than to 7 is a whole one away.
    """
    hidden_size = 2 * (scheme.group_size or 64)
    for width in WIDTHS:
        weight = matrix(shard, width, hidden_size)
        block = scheme.block(shard, tuple(weight.shape))
        codes, scale = scheme.quantize(weight, shard)
        step = dequantize(torch.ones_like(weight), scale.abs(), block) * (2 if scheme.of(shard).num_bits == 4 else 1)
        bound = step / 2 if scheme.type == "int" else (weight.abs() / 16).maximum(step * 2**-9)
        assert bool(((scheme.dequantize(codes, scale, shard) - weight).abs() <= bound * 1.0001).all())


def test_zeros_are_codes_of_scale_one() -> None:
    codes, scale = SCHEMES[0].quantize(torch.zeros(3, 256), "w1")
    assert not codes.any() and bool((scale == 1).all())


def test_pruning_cuts_no_group() -> None:
    """Kept rows of gate and columns of down have the codes and scales they have among all neurons."""
    keep = torch.tensor([3, 8, 40])
    for scheme in SCHEMES[:4]:
        hidden_size = scheme.group_size * 2
        for shard, axis in (("w1", 0), ("w2", 1)):
            weight = matrix(shard, 48, hidden_size)
            codes, scale = scheme.quantize(weight, shard)
            of_kept = scheme.quantize(weight.index_select(axis, keep), shard)
            assert torch.equal(codes.view(BITWISE).index_select(axis, keep), of_kept[0].view(BITWISE))
            assert torch.equal(scale.index_select(axis, keep), of_kept[1])


def test_group_sizes() -> None:
    sizes = {256: 128, 2880: 64, 96: 32, 64: 64}
    assert {hidden: ExpertScheme.for_hidden_size("int8", hidden).group_size for hidden in sizes} == sizes
    with pytest.raises(HeaprError, match="--quantize none"):
        ExpertScheme.for_hidden_size("int8", 48)


@pytest.mark.parametrize("hidden_size", [256, 192])
@pytest.mark.parametrize("width", [300, 96])
def test_scales_of_blocks_become_those_of_neurons(hidden_size: int, width: int) -> None:
    """DeepSeek's blocks are cut short at the edge; no value changes."""
    base = BaseQuantization.from_config(FP8, "model")
    scheme = base.scheme(hidden_size)
    for shard, shape in (("w1", (width, hidden_size)), ("w2", (hidden_size, width))):
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        scale = torch.rand(base.scale_shape(shape))
        by_neuron = base.neuron_scale(scale, shard, shape)
        assert tuple(by_neuron.shape) == scheme.scale_shape(shard, shape)
        wanted = dequantize(codes, scale, base.block(shape))
        assert torch.equal(dequantize(codes, by_neuron, scheme.block(shard, shape)), wanted)


def compressed(weights: dict, inputs: dict | None = None) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def packed(weights: dict, inputs: dict | None = None) -> dict:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 128} | weights
    return compressed(weights, inputs) | {"format": "pack-quantized"}


@pytest.mark.parametrize(
    ("block", "what"),
    [
        (GPTQ | {"bits": 3}, "GPTQ with 3 bits"),
        (GPTQ | {"bits": 8}, "GPTQ with 8 bits"),
        (GPTQ | {"sym": False}, "asymmetric GPTQ"),
        (GPTQ | {"desc_act": True}, "desc_act"),
        (GPTQ | {"group_size": -1}, "GPTQ with a group_size of -1"),
        (GPTQ | {"group_size": 2**40}, "GPTQ with a group_size of"),
        (GPTQ | {"group_size": 16}, "GPTQ with a group_size of 16"),
        (GPTQ | {"dynamic": {r"+:.*\.[0-3]\..*": {"bits": 8}}}, "other settings for some modules"),
        (AWQ | {"bits": 8}, "AWQ with 8 bits"),
        (AWQ | {"version": "gemv"}, "version gemv"),
        (AWQ | {"zero_point": False}, "AWQ without zero points"),
        (AWQ | {"group_size": -1}, "AWQ with a group_size of -1"),
        ({"quant_method": "modelopt"}, "modelopt"),
        (FP8 | {"activation_scheme": "static"}, "static activation scales"),
        (FP8 | {"weight_block_size": None}, "one scale per tensor"),
        (FP8 | {"weight_block_size": [128, 2**40]}, "blocks of 128 x 1099511627776"),
        (compressed({"strategy": "block", "block_structure": [2048, 128]}), "blocks of 2048 x 128"),
        (compressed({"num_bits": 4}), "int with 4 bits"),
        (packed({"num_bits": 8}), "int with 8 bits packed"),
        (packed({"strategy": "channel", "group_size": None}), "packed by channel"),
        (packed({"actorder": "group"}), "order of activations"),
        (packed({"actorder": "GROUP"}), "order of activations"),
        (packed({"actorder": "dynamic"}), "order of activations"),
        (packed({"actorder": True}), "order of activations"),
        (packed({"group_size": 16}), "group_size of 16"),
        (packed({}, {"dynamic": True}), "quantized activations"),
        (compressed({"type": "float", "num_bits": 4}), "float with 4 bits"),
        (compressed({"symmetric": False}), "int with 8 bits"),
        (compressed({"strategy": "group"}), "strategy group"),
        (compressed({}, {"dynamic": False}), "static activation scales"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 ways"),
    ],
)
def test_formats_not_supported(block: dict, what: str) -> None:
    with pytest.raises(HeaprError, match=rf"not supported yet \(.*{what}.*start from the unquantized"):
        BaseQuantization.from_config(block, "model")


@pytest.mark.parametrize(
    "block",
    [{"num_bits": 4, "type": "float"}, {"num_bits": 4, "strategy": "channel", "group_size": None}, {"num_bits": 3}]
    + [{"down_bits": 8}, {"num_bits": 4, "down_bits": 4}, {"num_bits": 4, "down_bits": 16}]
    + [{"type": "nvfp4"}, {"symmetric": False}, {"group_size": None}, {"strategy": "tensor"}],
)
def test_schemes_not_supported(block: dict) -> None:
    with pytest.raises(HeaprError, match="heapr export --quantize int8"):
        ExpertScheme.from_dict(SCHEMES[0].to_dict() | block)


def test_nibbles() -> None:
    """The first of two neighbours is in the lower half of their byte, and 8 is zero."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    codes[1] = codes[0].roll(3)
    packed = pack_nibbles(codes)
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack_nibbles(packed), codes)
    assert SCHEMES[3].zero_byte == pack_nibbles(torch.zeros(1, 2, dtype=torch.int8)).item()


def test_wider_codes_have_the_same_values() -> None:
    """What kernels get that take one width: codes of 4 bits are codes of 8."""
    scheme = SCHEMES[-1]
    assert scheme.name == "int4-int8" and scheme.widened() == SCHEMES[0]
    assert scheme.of("w13") == replace(scheme, down_bits=None) and scheme.of("w2") == SCHEMES[0]
    codes, scale = scheme.quantize(matrix("w1", 48, 256), "w1")
    wide = scheme.widened().dequantize(unpack_nibbles(codes), scale, "w1")
    assert torch.equal(wide, scheme.dequantize(codes, scale, "w1"))
    assert scheme.bits_per_weight() == (2 * 4 + 8) / 3 + 32 / 128


def test_schemes_read_what_they_write() -> None:
    for scheme in SCHEMES:
        assert ExpertScheme.from_dict(scheme.to_dict() | {"unknown": 1}) == scheme


def test_damage_is_seen() -> None:
    codes, scale = SCHEMES[1].quantize(torch.randn(4, 256), "w1")
    check_codes(codes, "codes")
    check_scale(scale, (4, 2), "scale")
    for code in (0x7F, 0xFF):
        damaged = codes.view(BITWISE).clone()
        damaged[1, 2] = code
        with pytest.raises(HeaprError, match="not numbers"):
            check_codes(damaged.view(codes.dtype), "codes")
    with pytest.raises(HeaprError, match=r"\[4, 2\] instead of \[4, 1\]"):
        check_scale(scale, (4, 1), "scale")
    scale[0, 0] = torch.nan
    with pytest.raises(HeaprError, match="not finite"):
        check_scale(scale, (4, 2), "scale")
