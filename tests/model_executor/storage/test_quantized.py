# SPDX-License-Identifier: Apache-2.0
"""Codes and scales in memory: what a rank holds of what a checkpoint has, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.four_bits import Gptq
from heapr_vllm.formats.quantized import BITWISE, ExpertScheme, dequantize
from heapr_vllm.model_executor.storage.dense import DenseStorage
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up
from heapr_vllm.model_executor.storage.quantized import QuantizedStorage
from heapr_vllm.model_executor.storage.shares import tensor_parallel_shares

HIDDEN, NEURONS, WIDTHS = 96, 40, (7, 0, 33)
GROUP = ExpertScheme.for_hidden_size("int8", HIDDEN)
NIBBLES = ExpertScheme.for_hidden_size("int4", HIDDEN)
TWO_WIDTHS = replace(NIBBLES, down_bits=8)
FLOATS = ExpertScheme.for_hidden_size("fp8", HIDDEN)
CHANNEL = ExpertScheme(type="int", strategy="channel", group_size=None)
BLOCKS = BaseQuantization("float", (32, 32), "_scale_inv")
CHANNELS = BaseQuantization("int", None, "_scale")
PACKED = BaseQuantization("int", (1, 32), "_scale", Gptq(32))
SHARDS = {"w1": "w13", "w3": "w13", "w2": "w2"}

Weights = dict[tuple[int, str], torch.Tensor]


def masks(is_compact: bool) -> LayerMasks:
    """Experts that keep their last neurons."""
    keep = torch.arange(NEURONS) >= NEURONS - torch.tensor(WIDTHS)[:, None]
    return LayerMasks("model.layers.0.mlp.experts", keep, None, is_compact)


def weights() -> Weights:
    """Full-size matrices [O, I] of every expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (NEURONS, HIDDEN), "w3": (NEURONS, HIDDEN), "w2": (HIDDEN, NEURONS)}
    return {(e, s): torch.randn(shapes[s], generator=generator) for e in range(len(WIDTHS)) for s in SHARDS}


def kept(weight: torch.Tensor, expert: int, shard: str) -> torch.Tensor:
    first = NEURONS - WIDTHS[expert]
    return weight[:, first:] if shard == "w2" else weight[first:]


class Rank:
    """A layer and its storage on one of `size` tensor-parallel ranks, stored in widths of 16."""

    def __init__(
        self,
        scheme: ExpertScheme,
        base: BaseQuantization | None,
        is_compact: bool,
        rank: int = 0,
        size: int = 1,
        *,
        widens: bool = False,
    ) -> None:
        shares = tensor_parallel_shares(WIDTHS, size, rank, 16)
        widths = [stop - start for start, stop in shares]
        layout = RaggedLayout.build(widths, [round_up(width, 16) for width in widths])
        local_ids = {expert: expert for expert in range(len(WIDTHS))}
        stored = scheme.widened() if widens else scheme
        self.storage = QuantizedStorage(
            masks(is_compact), local_ids, shares, layout, stored, base, widens=stored != scheme
        )
        self.layer = nn.Module()
        self.storage.create(self.layer, HIDDEN, torch.bfloat16, self.storage.load, {})
        for parameter in self.layer.parameters():
            bits = parameter.data.view(BITWISE) if parameter.itemsize == 1 else parameter.data
            bits.fill_(77)  # nothing is left to chance

    def load(self, tensor: torch.Tensor, expert: int, shard: str, suffix: str = "weight") -> None:
        name = f"{SHARDS[shard]}_{suffix}"
        assert self.storage.load(getattr(self.layer, name), tensor, f"layer.{name}", shard, expert)

    def values(self, expert: int, shard: str) -> torch.Tensor:
        """Neurons [share, H] of an expert's matrix, dequantised."""
        scales = self.storage.scales(self.layer)
        rows = self.storage._destination(getattr(self.layer, f"{SHARDS[shard]}_weight"), expert, shard)
        if shard == "w2" and scales.is_by_channel(HIDDEN):
            return rows.float() * scales.w2[self.storage.layout.slots[expert]]
        scale = self.storage._destination(scales.w2 if shard == "w2" else scales.w13, expert, shard)
        return self.storage.scheme.of(shard).dequantize(rows, scale, "w1")


def stored(weight: torch.Tensor, shard: str, scheme: ExpertScheme, base: BaseQuantization | None) -> tuple:
    """Codes, scales and values of a matrix in the checkpoint."""
    if base is None or base.packing:  # unpacked by the loader
        codes, scale = scheme.quantize(weight, shard)
        return codes, scale, scheme.dequantize(codes, scale, shard)
    scale = torch.rand(base.scale_shape(tuple(weight.shape))) + 0.5
    block = base.block(tuple(weight.shape))
    codes = (weight / dequantize(torch.ones_like(weight), scale, block)).to(scheme.code_dtype)
    return codes, scale, dequantize(codes, scale, block)


SOURCES = {
    "compact": (GROUP, None, True),
    "compact 4 bits": (NIBBLES, None, True),
    "compact 4 and 8 bits": (TWO_WIDTHS, None, True),
    "masks over 4 bits": (TWO_WIDTHS, PACKED, False),
    "compact floats": (FLOATS, None, True),
    "compact by channel": (CHANNEL, None, True),
    "masks over blocks": (replace(FLOATS, group_size=32), BLOCKS, False),
    "masks over channels": (CHANNEL, CHANNELS, False),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("widens", [False, True])
def test_ranks_hold_every_kept_neuron_once(source: str, size: int, widens: bool) -> None:
    """Also where the kernel wants all experts in as many bits as down_proj has."""
    scheme, base, is_compact = SOURCES[source]
    ranks = [Rank(scheme, base, is_compact, rank, size, widens=widens) for rank in range(size)]
    assert ranks[0].layer.w13_weight.dtype == (scheme.widened() if widens else scheme).code_dtype
    expected = {}
    for (expert, shard), weight in weights().items():
        codes, scale, values = stored(kept(weight, expert, shard) if is_compact else weight, shard, scheme, base)
        expected[expert, shard] = values if is_compact else kept(values, expert, shard)
        for rank in ranks:
            rank.load(codes, expert, shard)
            rank.load(scale, expert, shard, f"weight{base.scale_suffix if base else '_scale'}")
    for rank in ranks:
        rank.storage.check_complete()
        rank.storage.zero_padding(rank.layer)
    for (expert, shard), values in expected.items():
        found = [rank.values(expert, shard) for rank in ranks if rank.storage.layout.widths[expert]]
        joined = torch.cat(found) if found else torch.empty(0, HIDDEN)
        assert torch.equal(joined, values.T if shard == "w2" else values)


@pytest.mark.parametrize("scheme", [GROUP, FLOATS, NIBBLES], ids=lambda scheme: scheme.name)
def test_weights_are_rounded_while_they_come(scheme: ExpertScheme) -> None:
    """Row by row, so that every rank comes to the codes of an export."""
    rank = Rank(scheme, None, is_compact=False)
    for (expert, shard), weight in weights().items():
        rank.load(weight, expert, shard)
    rank.storage.check_complete()
    assert dict(rank.layer.named_buffers()).keys() == {"w13_weight_scale", "w2_weight_scale"}, "none of the checkpoint"
    for (expert, shard), weight in weights().items():
        if WIDTHS[expert]:
            part = kept(weight, expert, shard)
            codes, scale = scheme.quantize(part, shard)
            values = scheme.dequantize(codes, scale, shard)
            assert torch.equal(rank.values(expert, shard), values.T if shard == "w2" else values)


def test_scales_of_other_weights_survive_a_reload() -> None:
    """vLLM's reload loads into new buffers, and puts the first ones back on the layer afterwards."""
    rank = Rank(GROUP, None, is_compact=False)
    for (expert, shard), weight in weights().items():
        rank.load(weight, expert, shard)
    rank.storage.settle_scales(rank.layer)
    first = dict(rank.layer.named_buffers())
    for name, buffer in first.items():
        rank.layer.register_buffer(name, torch.ones_like(buffer), persistent=False)
    for (expert, shard), weight in weights().items():
        rank.load(3 * weight, expert, shard)
    new = {name: buffer.clone() for name, buffer in rank.layer.named_buffers()}
    rank.storage.settle_scales(rank.layer)
    for name, buffer in first.items():
        assert torch.equal(buffer, new[name])
    scale = first["w2_weight_scale"]
    torch.testing.assert_close(scale[scale < 1].max(), 3 * weights_scale())  # of padding it is 1


def weights_scale() -> torch.Tensor:
    """Largest scale of the down projections of `weights`."""
    scales = [
        GROUP.quantize(kept(weight, e, s), s)[1] for (e, s), weight in weights().items() if s == "w2" and WIDTHS[e]
    ]
    return torch.stack([scale.max() for scale in scales]).max()


def test_padding_is_code_0_and_scale_1() -> None:
    for scheme in (GROUP, CHANNEL, NIBBLES):
        rank = Rank(scheme, None, is_compact=True)
        rank.storage.zero_padding(rank.layer)
        row, width = rank.storage.layout.place(0)
        padded = slice(row + WIDTHS[0], row + width)
        scales = rank.storage.scales(rank.layer)
        zero = scheme.zero_byte
        assert (rank.layer.w2_weight[padded] == zero).all()
        assert (rank.layer.w2_weight[row : row + WIDTHS[0]] == 77).all()
        for first in (2 * row, 2 * row + width):
            half = slice(first + WIDTHS[0], first + width)
            assert (rank.layer.w13_weight[half] == zero).all() and bool((scales.w13[half] == 1).all())
        if scheme is not CHANNEL:
            assert bool((scales.w2[padded] == 1).all())


def test_padding_of_two_widths() -> None:
    rank = Rank(TWO_WIDTHS, None, is_compact=True)
    rank.storage.zero_padding(rank.layer)
    row, width = rank.storage.layout.place(0)
    assert (rank.layer.w2_weight[row + WIDTHS[0] : row + width] == 0).all()
    assert (rank.layer.w13_weight[2 * row + WIDTHS[0] : 2 * row + width] == NIBBLES.zero_byte).all()


def test_refused() -> None:
    rank = Rank(FLOATS, None, is_compact=True)
    codes, scale = FLOATS.quantize(kept(weights()[0, "w1"], 0, "w1"), "w1")
    damaged = torch.full(codes.shape, 0x7F, dtype=BITWISE).view(codes.dtype)
    for tensor, suffix, message in (
        (damaged, "weight", "not numbers; download or export it again"),
        (codes[1:], "weight", "6 neurons instead of 7"),
        (codes.bfloat16(), "weight", "weights and quantization_config do not belong together"),
        (scale[:, :1], "weight_scale", "scales and weights do not belong together"),
        (scale * torch.inf, "weight_scale", "not finite"),
    ):
        with pytest.raises(HeaprError, match=message):
            rank.load(tensor, 0, "w1", suffix)
    rank.load(codes, 0, "w1")
    with pytest.raises(HeaprError, match="lacks 11 expert tensors, first w1_scale of model.layers.0.mlp.experts.0"):
        rank.storage.check_complete()
    rounding = Rank(GROUP, None, is_compact=False)
    with pytest.raises(HeaprError, match="heapr export --quantize"):
        rounding.load(torch.zeros(NEURONS, HIDDEN, dtype=torch.int8), 0, "w1")
    with pytest.raises(HeaprError, match="--quantize none"):
        Rank(replace(GROUP, group_size=64), None, is_compact=True)


def test_weights_in_the_models_dtype_are_refused_likewise() -> None:
    kept_masks = masks(is_compact=True)
    layout = RaggedLayout.build(WIDTHS, [round_up(width, 16) for width in WIDTHS])
    storage = DenseStorage(kept_masks, {0: 0}, [(0, 7)], layout)
    parameter = nn.Parameter(torch.zeros(layout.num_rows, HIDDEN), requires_grad=False)
    for tensor, message in (
        (torch.zeros(8, HIDDEN), "has 8 neurons instead of 7"),
        (torch.zeros(7, HIDDEN, dtype=torch.int8), "config.json names no quantization"),
    ):
        with pytest.raises(HeaprError, match=message):
            storage.load(parameter, tensor, "w13_weight", "w1", 0)
