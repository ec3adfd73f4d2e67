# SPDX-License-Identifier: Apache-2.0
"""Options refused at start-up, option by option."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.model_executor import unsupported
from heapr_vllm.model_executor.quantization import HeaprConfig
from tests import quantized_models


def refuse(
    monkeypatch,
    *,
    eplb=False,
    lora=None,
    load_format="auto",
    activation=MoEActivation.SILU,
    has_bias=False,
    online=None,
    swiglu_limit=None,
    data_parallel_size=1,
    all2all_backend="allgather_reducescatter",
    on_cpu=True,
) -> None:
    parallel = SimpleNamespace(enable_eplb=eplb, data_parallel_size=data_parallel_size, all2all_backend=all2all_backend)
    vllm_config = SimpleNamespace(
        parallel_config=parallel, lora_config=lora, load_config=SimpleNamespace(load_format=load_format)
    )
    monkeypatch.setattr(unsupported, "get_current_vllm_config", lambda: vllm_config)
    platform = SimpleNamespace(is_cuda_alike=lambda: not on_cpu, is_cpu=lambda: on_cpu)
    monkeypatch.setattr(unsupported, "current_platform", platform)
    layer = SimpleNamespace(
        activation=activation,
        moe_config=SimpleNamespace(has_bias=has_bias),
        swiglu_limit=swiglu_limit,
        layer_name="model.layers.0.mlp.experts",
    )
    config = HeaprConfig()
    config.online_quantization_config = online
    unsupported.refuse_unsupported(layer, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eplb": True}, "drop --enable-eplb"),
        ({"data_parallel_size": 2}, "use --tensor-parallel-size instead"),
        ({"all2all_backend": "passthrough"}, "drop --moe-backend"),
        ({"lora": SimpleNamespace(target_modules=None)}, "--lora-target-modules q_proj"),
        ({"lora": SimpleNamespace(target_modules=["q_proj", "experts"])}, "--lora-target-modules q_proj"),
        ({"online": object()}, "drop --quantization-config"),
        ({"load_format": "sharded_state"}, "use auto, safetensors or heapr"),
        ({"load_format": "fastsafetensors"}, "reads files into a GPU's memory; use auto"),
        ({"activation": MoEActivation.GELU}, "has activation gelu"),
        ({"has_bias": True}, "bias True"),
        ({"swiglu_limit": 7.0}, "limit 7.0"),
    ],
)
def test_refused(monkeypatch, options: dict, message: str) -> None:
    with pytest.raises(HeaprError, match=message):
        refuse(monkeypatch, **options)


def test_accepted(monkeypatch) -> None:
    refuse(monkeypatch)
    refuse(monkeypatch, lora=SimpleNamespace(target_modules=["q_proj", "o_proj"]), load_format="runai_streamer")
    refuse(monkeypatch, on_cpu=False, data_parallel_size=2, load_format="fastsafetensors")


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16"])
def test_loaders_that_do_not_unpack(name: str, monkeypatch) -> None:
    base = BaseQuantization.from_config(quantized_models.block(name, []), name)
    refuse(monkeypatch, load_format="runai_streamer")
    for other in (None, BaseQuantization.from_config(quantized_models.block("fp8-block", []), "fp8")):
        unsupported.refuse_other_loaders(other)
    with pytest.raises(HeaprError, match="use heapr, or write a checkpoint with `heapr export`"):
        unsupported.refuse_other_loaders(base)
    refuse(monkeypatch, load_format="heapr")
    unsupported.refuse_other_loaders(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*quantized_models.FOUR_BITS, "fp8-block", "int8-linears"])
def test_float32_and_4_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(unsupported, "get_current_vllm_config", lambda: vllm_config)
    is_refused = dtype == torch.float32 and name in quantized_models.FOUR_BITS
    with pytest.raises(HeaprError, match="o_proj has.*--dtype bfloat16") if is_refused else nullcontext():
        unsupported.refuse_float32(quantized_models.block(name, []), "model.layers.0.self_attn.o_proj")
