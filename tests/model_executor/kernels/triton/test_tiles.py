# SPDX-License-Identifier: Apache-2.0
"""Tiles: which fit a layer, and the defaults of every way to store experts."""

from dataclasses import replace
from math import gcd

import pytest
import torch

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton.tiles import (
    LayerShape,
    Tile,
    TileConfig,
    default_config,
    plane_size,
    rounded_group,
)

SHAPE = LayerShape(2048, 8, 128, 576, 768, torch.bfloat16)
PAPER_SHAPES = [(128, 8, 2048), (64, 6, 2048), (60, 4, 2048), (64, 8, 3584)]
BY_CHANNEL = ExpertScheme(strategy="channel", group_size=None)
ROUNDED = TileConfig(16, Tile(64, 32), Tile(32, 64))


def shape_of(hidden_size: int, scheme: ExpertScheme | None = None, activation_bits: int | None = None) -> LayerShape:
    return replace(SHAPE, hidden_size=hidden_size, scheme=scheme, activation_bits=activation_bits)


@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("shape", PAPER_SHAPES)
def test_default_tiles_fit_the_paper_models(tokens: int, shape: tuple[int, int, int]) -> None:
    num_experts, top_k, hidden = shape
    for hopper in (True, False):
        layer = LayerShape(hidden, top_k, num_experts, 576, 768, torch.bfloat16)
        default_config(tokens, layer, hopper).check(layer)


@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("hidden", [2048, 2880, 3584, 96])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_default_tiles_in_8_bits(kind: str, hidden: int, tokens: int) -> None:
    """Within groups, which are 32 where the hidden size has no larger power of two; by channel as without codes."""
    dense = LayerShape(hidden, 8, 128, 576, 768, torch.bfloat16)
    for hopper in (True, False):
        for group_size in (gcd(hidden, 128), None):
            scheme = ExpertScheme(kind, strategy="group" if group_size else "channel", group_size=group_size)
            shape = replace(dense, scheme=scheme)
            config = default_config(tokens, shape, hopper)
            config.check(shape)
            assert config.decode == ("cast" if hopper and kind == "float" else "bits")
            if group_size is None:
                assert replace(config, decode="bits") == default_config(tokens, dense, hopper)
            wide = default_config(tokens, replace(shape, dtype=torch.float32), hopper)
            assert (
                wide.up.block_n == default_config(tokens, replace(dense, dtype=torch.float32), hopper).up.block_n == 32
            )


@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize(("hidden", "step"), [(2048, 256), (2880, 64), (3584, 256), (896, 128)])
def test_default_tiles_in_4_bits(hidden: int, step: int, tokens: int) -> None:
    """A step of the up kernel is four planes, of 64 inputs where the hidden size allows that."""
    shape = LayerShape(hidden, 8, 128, 576, 768, torch.bfloat16, ExpertScheme.for_hidden_size("int4", hidden))
    for hopper in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            config = default_config(tokens, replace(shape, dtype=dtype), hopper)
            config.check(shape)
            assert config.up.block_k == step and config.decode == "bits"


@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("hidden", [2048, 2880, 3584, 96])
def test_default_tiles_for_rounded_activations(hidden: int, tokens: int) -> None:
    for group_size in (gcd(hidden, 128), 32, None):
        scheme = ExpertScheme("int", strategy="group" if group_size else "channel", group_size=group_size)
        shape = LayerShape(hidden, 8, 128, 576, 768, torch.bfloat16, scheme, activation_bits=8)
        config = default_config(tokens, shape)
        config.check(shape)
        assert config.up.block_k == rounded_group(group_size or hidden)
        assert config.block_m == default_config(tokens, replace(shape, activation_bits=None)).block_m


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(ROUNDED, up=Tile(64, 64)), "have to be"),
        (replace(ROUNDED, down=Tile(32, 32)), "have to be"),
        (replace(ROUNDED, up=Tile(32, 32)), "have to be"),
        (replace(ROUNDED, down=Tile(64, 64)), "hidden size 96 is no multiple"),
        (replace(ROUNDED, fused=False), "need fused"),
        (replace(ROUNDED, chained=True, prefetch=True), "neither tma nor prefetch"),
        (replace(ROUNDED, down=Tile(32, 64, tma=True)), "neither tma nor prefetch"),
    ],
)
def test_tiles_that_do_not_fit_rounded_activations(config: TileConfig, message: str) -> None:
    shape = shape_of(96, BY_CHANNEL, activation_bits=8)
    assert ROUNDED.is_possible(shape) and not config.is_possible(shape)
    with pytest.raises(ValueError, match=message):
        config.check(shape)


def test_names_of_tuned_files() -> None:
    """Dense ones as they have been; those of codes say how experts are stored, beside the type of tokens."""
    in_4_bits = ExpertScheme(num_bits=4, group_size=64)
    names = [
        replace(SHAPE, scheme=scheme).file_name("H 200")
        for scheme in (None, ExpertScheme("float"), BY_CHANNEL, in_4_bits)
    ]
    rounded = replace(SHAPE, scheme=BY_CHANNEL, activation_bits=8).file_name("H 200")
    assert rounded == names[2].replace(",device", ",activation_bits=8,device")
    assert names == [
        "hidden_size=2048,top_k=8,dtype=bfloat16,device=H_200.json",
        "hidden_size=2048,top_k=8,dtype=bfloat16,experts=fp8_group128,device=H_200.json",
        "hidden_size=2048,top_k=8,dtype=bfloat16,experts=int8_channel,device=H_200.json",
        "hidden_size=2048,top_k=8,dtype=bfloat16,experts=int4_group64,device=H_200.json",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TileConfig(16, Tile(32, 64), Tile(32, 32)), "groups of 32 that share a scale are no multiple"),
        (TileConfig(16, Tile(32, 32), Tile(64, 32)), "groups of 32 that share a scale are no multiple"),
        (TileConfig(16, Tile(32, 32, tma=True), Tile(32, 64)), "tma reads no codes"),
        (TileConfig(16, Tile(32, 32), Tile(32, 64, tma=True)), "tma reads no codes"),
        (TileConfig(16, Tile(32, 32), Tile(32, 64), decode="guess"), "decode is 'guess', not one of bits, cast"),
    ],
)
def test_tiles_that_do_not_fit_codes(config: TileConfig, message: str) -> None:
    shape = shape_of(64, ExpertScheme(group_size=32))
    assert not config.is_possible(shape)
    with pytest.raises(ValueError, match=message):
        config.check(shape)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TileConfig(16, Tile(32, 64), Tile(32, 64)), "need fused, and block_k 128 and 64"),
        (TileConfig(16, Tile(32, 128), Tile(32, 32)), "need fused, and block_k 128 and 64"),
        (TileConfig(16, Tile(32, 128), Tile(32, 64), fused=False), "need fused, and block_k 128 and 64"),
        (TileConfig(16, Tile(32, 128), Tile(64, 64)), "groups of 32 that share a scale are no multiple"),
        (TileConfig(16, Tile(32, 128, tma=True), Tile(32, 64)), "tma reads no codes"),
    ],
)
def test_tiles_that_do_not_fit_codes_of_4_bits(config: TileConfig, message: str) -> None:
    shape = shape_of(128, ExpertScheme(num_bits=4, group_size=32))
    assert not config.is_possible(shape)
    with pytest.raises(ValueError, match=message):
        config.check(shape)


@pytest.mark.parametrize(
    ("hidden", "group", "plane"),
    [(2048, 64, 64), (2048, 128, 64), (2048, 32, 32), (384, 64, 32), (2880, 64, 16), (64, 64, 16), (96, 32, 0)],
)
def test_planes(hidden: int, group: int, plane: int) -> None:
    assert plane_size(hidden, group) == plane


def test_default_blocks_are_as_tall_as_stock_vllms() -> None:
    shape = LayerShape(2048, 8, 128, 576, 768, torch.bfloat16)
    heights = {tokens: default_config(tokens, shape, True).block_m for tokens in (1, 64, 160, 256, 320, 512, 640, 1024)}
    assert heights == {1: 16, 64: 16, 160: 16, 256: 32, 320: 32, 512: 64, 640: 64, 1024: 128}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TileConfig(16, Tile(32, 48), Tile(32, 32)), "hidden size 64 is no multiple"),
        (TileConfig(16, Tile(32, 32), Tile(48, 32)), "hidden size 64 is no multiple"),
        (TileConfig(16, Tile(32, 32), Tile(32, 128)), "down.block_k 128 does not divide 64"),
        (TileConfig(16, Tile(32, 32, tma=True), Tile(32, 64), fused=False), "up.tma needs fused"),
        (TileConfig(16, Tile(32, 32), Tile(32, 32, tma=True)), "down.tma needs down.block_k 64"),
        (TileConfig(16, Tile(32, 32), Tile(32, 64), prefetch=True), "prefetch needs chained"),
        (TileConfig(16, Tile(32, 32), Tile(32, 64, tma=True), chained=True, prefetch=True), "prefetch needs chained"),
    ],
)
def test_tiles_that_do_not_fit(config: TileConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(shape_of(64))
