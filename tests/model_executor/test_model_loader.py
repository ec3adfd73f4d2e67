# SPDX-License-Identifier: Apache-2.0
"""Which weights a pruned model must bring; that it is refused without them: test_serving.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8KVCacheMethod
from vllm.model_executor.model_loader import get_model_loader

import heapr_vllm
from heapr_vllm.errors import HeaprError
from heapr_vllm.model_executor.model_loader import CompleteModelLoader, held_experts, missing_parts, needed_parameters
from heapr_vllm.model_executor.moe_method import HeaprMoEMethod
from heapr_vllm.model_executor.storage.dense import DenseStorage
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks
from heapr_vllm.model_executor.storage.layout import RaggedLayout

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0."


def parameter(size: int = 2) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


class Model(nn.Module):
    """A norm, tied embeddings, attention with scales of a key-value cache, and parameters of other kinds."""

    packed_modules_mapping = FUSED

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.attention, self.online = (nn.Module() for _ in range(4))
        self.norm, self.a = parameter(), nn.Module()
        self.a.gate_up_proj = nn.Module()
        self.embed.weight = self.head.weight = parameter()
        self.attention.weight, self.attention.cache = parameter(), nn.Module()
        self.attention.cache.k_scale, self.attention.cache.quant_method = parameter(), object.__new__(Fp8KVCacheMethod)
        self.attention.qzeros, self.attention.input_scale_ub = parameter(0), parameter()
        self.online.weight, self.online.quant_method = parameter(), SimpleNamespace(uses_meta_device=True)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        return {"embed.weight" if name == "head.weight" else name for name, _ in weights}


def test_parameters_that_a_checkpoint_must_bring() -> None:
    assert set(needed_parameters(Model())) == {"norm", "embed.weight", "attention.weight"}


def test_experts_that_a_rank_holds() -> None:
    """By the names of the checkpoint; an expert without neurons here is left out."""
    prefix = "model.layers.0.mlp.experts"
    masks = LayerMasks(f"language_model.{prefix}", torch.ones(4, 64, dtype=torch.bool), None, False, prefix)
    layout = RaggedLayout.build([64, 0, 3], [64, 0, 16])
    method = object.__new__(HeaprMoEMethod)
    method.masks, method.storage = masks, DenseStorage(masks, {3: 0, 1: 1, 0: 2}, [(0, 64), (0, 0), (0, 3)], layout)
    model = Model()
    model.a.quant_method = method
    assert held_experts(model) == {prefix: {3, 0}}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([f"self_attn.{part}.weight" for part in FUSED["qkv_proj"]], set()),
        (["self_attn.q_proj.weight", "self_attn.v_proj.weight"], {"self_attn.k_proj.weight"}),
        (["mlp.up_proj.weight_scale_inv"], {"mlp.gate_proj.weight_scale_inv"}),
        (["self_attn.k_proj.k_scale", "self_attn.o_proj.weight", "A_log"], set()),
        (["mla.q_proj.weight"], set()),
        (["mlp.experts.3.up_proj.weight", "mlp.experts.3.up_proj.weight_scale"], set()),
        (["self_attn.q_proj.qweight", "self_attn.k_proj.qweight"], {"self_attn.v_proj.qweight"}),
        (["mlp.up_proj.scales", "mlp.up_proj.qzeros"], {"mlp.gate_proj.scales", "mlp.gate_proj.qzeros"}),
    ],
)
def test_parts_of_fused_weights(names: list[str], missing: set[str]) -> None:
    modules = {f"renamed.{place}" for place in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mla.q_proj")}
    assert set(missing_parts({LAYER + name for name in names}, FUSED, modules)) == {LAYER + name for name in missing}


def loaded(
    quantization: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch, **extra: bool
) -> CompleteModelLoader:
    """What becomes of a model whose checkpoint has these tensors."""
    heapr_vllm.register()
    loader = get_model_loader(LoadConfig(model_loader_extra_config=extra))
    assert isinstance(loader, CompleteModelLoader)
    source = ((name, torch.zeros(2)) for name in names)
    monkeypatch.setattr(loader, "_get_weights_iterator", lambda _: source)
    for name in ("_init_ep_weight_filter", "_init_mm_encoder_only_weight_filter"):
        monkeypatch.setattr(loader, name, lambda *_: None, raising=False)
    config = SimpleNamespace(quantization=quantization, model="pruned", revision=None)
    loader.load_weights(Model(), config)
    return loader


def test_every_weight_must_come(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["norm", "head.weight", "attention.weight"]
    loaded("heapr", names, monkeypatch)
    with pytest.raises(HeaprError, match=r"^pruned lacks attention.weight and 1 more weights; export or download"):
        loaded("heapr", ["head.weight"], monkeypatch)
    with pytest.raises(HeaprError, match=r"^pruned lacks a.up_proj.weight; export"):
        loaded("heapr", [*names, "a.gate_proj.weight"], monkeypatch)


def test_other_models_are_vllms_business(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded("fp8", [], monkeypatch)
    loaded("heapr", [], monkeypatch, enable_weights_track=False)
    with pytest.raises(ValueError, match="not initialized from checkpoint") as error:
        loaded(None, ["head.weight"], monkeypatch)
    assert not isinstance(error.value, HeaprError)
