# SPDX-License-Identifier: Apache-2.0
"""What the opponents in 8 and 4 bits are made of and called with; that they run is for a GPU to show."""

import inspect

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from benchmarks import stock_quantized_moe as opponents
from benchmarks.stock_moe import UniformLayer
from heapr_vllm.formats.quantized import dequantize
from heapr_vllm.model_executor.tuning.synthetic import MoEShape, random_batch

pytest.importorskip("vllm")
MOE = MoEShape(2, 2, 256, 128)
CPU = torch.device("cpu")


@pytest.fixture
def layer() -> UniformLayer:
    torch.manual_seed(0)
    return UniformLayer.build(MOE, MOE.moe_intermediate_size, torch.float16, CPU, 2)


def relative_error(values: torch.Tensor, weight: torch.Tensor) -> float:
    return float((values.float() - weight.float()).norm() / weight.float().norm())


def test_fp8_blocks_are_near_the_weights(layer: UniformLayer) -> None:
    codes, scale = opponents.in_blocks(layer.w1[0])
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (2, 2, 2)
    values = torch.stack([dequantize(*pair, (128, 128)) for pair in zip(codes, scale, strict=True)])
    assert relative_error(values, layer.w1[0]) < 0.04
    with pytest.raises(ValueError, match="blocks of 128 do not divide a matrix of 64 x 256"):
        opponents.in_blocks(layer.w1[0][:, :64])


def test_gptq_words_are_near_the_weights(layer: UniformLayer) -> None:
    weight = layer.w2[0]
    words, scale = opponents.as_gptq(weight)
    assert words.shape == (2, 128 // 8, 256) and scale.shape == (2, 1, 256)
    codes = unpack_from_int32(words[1].T.contiguous(), 4, torch.Size((256, 128)))  # subtracts the zero
    values = dequantize(codes, scale[1].T, (1, 128))
    assert 0.02 < relative_error(values, weight[1]) < 0.15


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[inspect.BoundArguments]:
    """Puts functions of vLLM that need a GPU out of action: what they are called with must fit their signatures."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    found: list[inspect.BoundArguments] = []
    for module, name in (
        (_custom_ops, "gptq_marlin_moe_repack"),
        (marlin_moe, "fused_marlin_moe"),
        (fused_moe, "fused_experts"),
    ):
        signature = inspect.signature(getattr(module, name))

        def record(*args, signature=signature, **kwargs):
            found.append(signature.bind(*args, **kwargs))
            return args[0]

        record.__signature__ = signature
        monkeypatch.setattr(module, name, record)
    return found


def test_calls_fit_this_vllm(layer: UniformLayer, calls: list[inspect.BoundArguments]) -> None:
    batch = random_batch(3, MOE, torch.float16, CPU)
    for _, kind in opponents.OPPONENTS.values():
        assert kind.of(layer).vllm(batch, copy=3) is batch.x
    fp8, *repacked, marlin = calls
    assert fp8.arguments["quant_config"].block_shape == [128, 128]
    assert fp8.arguments["quant_config"].use_fp8_w8a8
    assert [(call.arguments["size_k"], call.arguments["size_n"]) for call in repacked] == [(256, 256)] * 2 + [
        (128, 256)
    ] * 2
    assert marlin.arguments["global_num_experts"] == 2 and marlin.arguments["w2_scale"].shape == (2, 1, 256)
