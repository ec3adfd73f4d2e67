# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits in the formats of base models: other readers see the same, and damage is refused."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats import sizes
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.fingerprint import fingerprint
from heapr_vllm.formats.four_bits import Packing
from heapr_vllm.formats.quantized import dequantize
from heapr_vllm.formats.reader import TensorReader
from tests import quantized_models
from tests.quantized_models import BLOCK, FOUR_BITS

UP = "model.layers.1.mlp.experts.5.up_proj"
SHAPES = {"w1": (96, 64), "w3": (48, 96), "w2": (64, 80)}  # the last one's groups of inputs are cut short
DTYPES = (torch.int32, torch.int64, torch.int8, torch.uint8, torch.uint32, torch.bool, torch.float32, torch.float16)
DTYPES += (torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64)  # of safetensors
KINDS = [name for name in FOUR_BITS if not name.endswith("linears")]


def stored(name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor], BaseQuantization]:
    """A weight, its tensors as `Packing` calls them, and the format."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.1
    tensors = quantized_models.stored("X.weight", weight, name)
    form = BaseQuantization.from_config(quantized_models.block(name, []), name)
    return weight, {key.removeprefix("X."): tensor for key, tensor in tensors.items()}, form


def packing_of(form: BaseQuantization) -> Packing:
    assert form.packing is not None
    return form.packing


def check_near(found: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Half a step at most, but beyond the largest and the least code of a group, where weights are cut."""
    groups = zip(found.split(BLOCK, 1), weight.split(BLOCK, 1), scale.float().split(1, 1), strict=True)
    for values, wanted, step in groups:
        error, least, largest = (values - wanted).abs(), values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        is_cut = (wanted < least) | (wanted > largest)
        assert bool((error <= torch.where(is_cut, 1.01, 0.51) * step).all())


@pytest.mark.parametrize("shard", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_values(name: str, shard: str) -> None:
    """Near the weight, see `check_near`; of experts gate and up keep every value, down most of 8 bits."""
    weight, parts, form = stored(name, SHAPES[shard])
    codes, scale = packing_of(form).unpack(parts, "X.weight")
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    found = dequantize(codes, scale, form.block(weight.shape))
    check_near(found, weight, scale)
    codes, scale = form.neuron_codes(parts, shard, "X.weight")
    hidden_size = weight.shape[0] if shard == "w2" else weight.shape[1]
    scheme = form.scheme(hidden_size)
    assert tuple(scale.shape) == scheme.scale_shape(shard, weight.shape)
    kept = scheme.dequantize(codes, scale, shard)
    if shard != "w2":
        assert torch.equal(kept, found)
    assert (kept - found).norm() <= 0.01 * found.norm()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w4a16-asymmetric", (1, 64)), ("w4a16-asymmetric", (8, 64)), ("w4a16-asymmetric", (9, 64))]
    + [("gptq", (96, 8)), ("gptq", (8, 64)), ("awq", (8, 64)), ("awq", (96, 9)), ("w4a16", (1, 8))],
)
def test_small_matrices(name: str, shape: tuple[int, int]) -> None:
    """Whose parts are a row or a column of words."""
    weight, parts, form = stored(name, shape)
    codes, scale = packing_of(form).unpack(parts, "X.weight")
    check_near(dequantize(codes, scale, form.block(shape)), weight, scale)


@pytest.mark.parametrize("name", [name for name in KINDS if "w4a16" in name])
def test_compressed_tensors_decompresses_the_same(name: str) -> None:
    for shape in ((96, 64), (60, 96)):
        _, parts, form = stored(name, shape)
        arguments = quantized_models.block(name, [])["config_groups"]["group_0"]["weights"]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        wanted = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        codes, scale = packing_of(form).unpack(parts, "X.weight")
        assert torch.equal(dequantize(codes, scale, form.block(shape)).to(wanted.dtype), wanted)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_vllm_unpacks_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its conversion from AWQ, and its own reader of what results, and of GPTQ."""
    from torch import nn
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    _, parts, form = stored(name, SHAPES["w1"])
    layer = nn.Module()
    for part in ("qweight", "qzeros"):
        layer.register_parameter(part, nn.Parameter(parts[part], requires_grad=False))
    zeros = torch.full((96, 2), 8)
    if name == "awq":
        _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
        zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, 0)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, 0)
    found, _ = packing_of(form).unpack(parts, "X.weight")
    assert torch.equal(found.int(), codes.T - zeros.repeat_interleave(BLOCK, 1))


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("gptq", "qzeros", None, "has no qzeros beside its qweight"),
        ("gptq", "scales", None, "has no scales"),
        ("awq", "qzeros", None, "has no qzeros"),
        ("w4a16-asymmetric", "weight_zero_point", None, "has no weight_zero_point"),
        ("gptq", "qzeros", lambda zeros: zeros[:1], r"has qzeros \[1, 12\] instead of \[2, 12\]"),
        ("awq", "scales", lambda scales: scales[:, 1:], r"has scales \[2, 95\] instead of \[2, 96\]"),
        ("w4a16", "weight_scale", lambda scale: scale.T, r"has weight_scale \[2, 96\] instead of \[96, 2\]"),
        ("w4a16", "weight_shape", lambda shape: shape - 1, "has weight_shape"),
        ("gptq", "qweight", lambda codes: codes.flatten(), "no matrix of codes"),
        ("awq", "qweight", lambda codes: codes.float(), "qweight of torch.float32 instead of torch.int32"),
        ("awq", "qzeros", lambda zeros: zeros.long(), "qzeros of torch.int64 instead of torch.int32"),
        ("gptq", "qzeros", lambda zeros: zeros.to(torch.int8), "qzeros of torch.int8"),
        (
            "w4a16-asymmetric",
            "weight_zero_point",
            lambda zeros: zeros.to(torch.int8),
            "weight_zero_point of torch.int8",
        ),
        ("w4a16", "weight_shape", lambda shape: shape.float(), "weight_shape of torch.float32"),
        ("w4a16", "weight_scale", lambda scale: scale.double(), "weight_scale of torch.float64"),
        ("w4a16", "weight_scale", lambda scale: scale.to(torch.float8_e4m3fn), "weight_scale of torch.float8"),
        ("awq", "scales", lambda scales: scales / 0, "not finite"),
        ("awq", "scales", lambda scales: scales.int(), "scales of torch.int32"),
        ("awq", "scales", lambda scales: torch.full(scales.shape, 3e38), "not finite"),
        ("gptq", "qzeros", lambda zeros: zeros + 1, "symmetric and has zero points"),
        ("gptq", "g_idx", lambda order: order.flip(0), "desc_act false"),
        ("gptq", "g_idx", lambda order: order[1:], "desc_act false"),
        ("gptq", "g_idx", lambda order: order.to(torch.complex64), "desc_act false"),
    ],
)
def test_damage_is_seen(name: str, part: str, change, message: str) -> None:
    _, parts, form = stored(name, SHAPES["w1"])
    tensor = parts.pop(part)
    if change is not None:
        parts[part] = change(tensor)
    with pytest.raises(HeaprError, match=message):
        packing_of(form).unpack(parts, "X.weight")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tensors_give_a_value_or_are_refused(data: st.DataObject) -> None:
    """Whatever dtypes and shapes the parts of a weight have, and their bytes."""
    _, parts, form = stored(data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([(96, 64), (8, 8), (16, 0)])))
    for part in data.draw(st.sets(st.sampled_from(sorted(parts)), min_size=1)):
        shape = data.draw(
            st.sampled_from([tuple(parts[part].shape), (), (0,), (2,), (0, 8), (8, 0), (1, 8), (2, 1, 4)])
        )
        dtype = data.draw(st.sampled_from(DTYPES))
        seed = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
        numbers = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=seed)
        parts[part] = numbers.view(dtype).view(shape) if dtype != torch.bool else numbers.view(shape) > 127
    try:
        codes, scale = packing_of(form).unpack(parts, "X.weight")
    except HeaprError as error:
        assert re.search("download the checkpoint again|desc_act false", str(error))
    else:
        assert codes.dtype == torch.int8 and bool(dequantize(codes, scale, form.block(codes.shape)).isfinite().all())


def test_order_of_groups_may_be_left_out() -> None:
    _, parts, form = stored("gptq", SHAPES["w1"])
    with_order, _ = packing_of(form).unpack(parts, "X.weight")
    del parts["g_idx"]
    assert torch.equal(packing_of(form).unpack(parts, "X.weight")[0], with_order)


def test_the_second_version_of_gptq_stores_zero_points_as_they_are() -> None:
    _, parts, form = stored("gptq", SHAPES["w1"])
    first, _ = packing_of(form).unpack(parts, "X.weight")
    parts["qzeros"] += 0x11111111
    assert torch.equal(packing_of(form).unpack(parts, "X.weight")[0], first)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_checkpoint_by_logical_names(name: str, qwen3: Path, tmp_path: Path) -> None:
    """Names and shapes are those of the unquantized model, sizes those of the files."""
    sibling, plain = Checkpoint(quantized_models.quantized(qwen3, tmp_path / "base", name)), Checkpoint(qwen3)
    assert sibling.weight_map.keys() == plain.weight_map.keys()
    assert {key: shape for key, (_, shape) in sibling.headers.items()} == {
        key: shape for key, (_, shape) in plain.headers.items()
    }
    assert sibling.expert_shapes() == plain.expert_shapes() and fingerprint(sibling) == fingerprint(plain)
    assert sizes.num_bytes(sibling) == sum(t.nbytes for t in load_file(sibling.path / "model.safetensors").values())
    wanted = quantized_models.values(sibling.path)
    with TensorReader(sibling, torch.float32) as reader:
        for key in sibling.weight_map:
            assert torch.equal(reader.tensor(key), wanted[key])


@pytest.mark.parametrize("shards", [("scales",), ("g_idx", "qzeros")])
def test_tensors_of_a_weight_in_several_shards(shards: tuple[str, ...], qwen3: Path, tmp_path: Path) -> None:
    """As where one shard ends and the next one begins."""
    base = quantized_models.quantized(qwen3, tmp_path / "base", "gptq")
    wanted = quantized_models.values(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    other = {name: tensors.pop(name) for name in list(tensors) if name.endswith(shards)}
    save_file(tensors, base / "first.safetensors")
    save_file(other, base / "second.safetensors")
    weight_map = dict.fromkeys(tensors, "first.safetensors") | dict.fromkeys(other, "second.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with TensorReader(Checkpoint(base), torch.float32) as reader:
        for key, value in wanted.items():
            assert torch.equal(reader.tensor(key), value)


def test_a_missing_tensor_is_said_before_anything_is_read(qwen3: Path, tmp_path: Path) -> None:
    base = quantized_models.quantized(qwen3, tmp_path / "base", "awq")
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{UP}.qzeros"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(HeaprError, match=rf"{UP}.weight is damaged: it has no qzeros .* download"):
        Checkpoint(base).expert_shapes()
