# SPDX-License-Identifier: Apache-2.0
"""Masks: bit format, reproducible bytes, damage, and the masked forward in transformers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.masks import NeuronMasks, pack_bits, unpack_bits
from heapr_vllm.prune import NeuronMoments
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.selection.selector import select

PREFIX = "model.layers.0.mlp.experts"


@given(experts=st.integers(1, 4), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_bits_round_trip(experts: int, width: int, seed: int) -> None:
    keep = torch.rand(experts, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(keep)
    assert packed.shape == (experts, (width + 7) // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, width), keep)


def test_bit_k_of_byte_j_is_neuron_8j_plus_k() -> None:
    keep = torch.zeros(1, 20, dtype=torch.bool)
    keep[0, [0, 3, 9, 19]] = True
    assert pack_bits(keep).tolist() == [[0b00001001, 0b00000010, 0b00001000]]


def test_file_is_byte_reproducible(awkward_masks: NeuronMasks, tmp_path: Path) -> None:
    awkward_masks.save(tmp_path / "a")
    reordered = NeuronMasks(dict(reversed(awkward_masks.keep.items())), dict(reversed(awkward_masks.metadata.items())))
    reordered.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert list(file.metadata()) == ["heapr"]


def test_save_and_from_pretrained(awkward_masks: NeuronMasks, tmp_path: Path) -> None:
    awkward_masks.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / MASKS_FILE):
        again = NeuronMasks.from_pretrained(source)
        assert again.metadata == awkward_masks.metadata
        assert all(torch.equal(again.keep[prefix], keep) for prefix, keep in awkward_masks.keep.items())


def test_calibration_tokens_travel_with_the_masks(calibration: Path, tmp_path: Path) -> None:
    moments = NeuronMoments.from_pretrained(calibration)
    select(moments, 0.5).save(tmp_path / "masks")
    assert NeuronMasks.load(tmp_path / "masks").tokens(PREFIX) == moments.tokens[PREFIX].tolist()
    NeuronMasks({PREFIX: torch.ones(2, 4, dtype=torch.bool)}).save(tmp_path / "unknown")
    assert NeuronMasks.load(tmp_path / "unknown").tokens(PREFIX) is None
    NeuronMasks({PREFIX: torch.ones(2, 4, dtype=torch.bool)}, {"tokens": {PREFIX: [1]}}).save(tmp_path / "short")
    with pytest.raises(HeaprError, match="counts the tokens of 1 experts of"):
        NeuronMasks.load(tmp_path / "short")


def test_executed_reduction_weights_experts_by_tokens() -> None:
    keep = torch.tensor([[True] * 4, [True, True, False, False]])
    masks = NeuronMasks({PREFIX: keep})
    assert masks.sparsity == pytest.approx(0.25)
    assert masks.executed_reduction({PREFIX: torch.tensor([3, 1])}) == pytest.approx(1 - (12 + 2) / 16)


def test_applied_equals_the_masked_checkpoint(awkward_masks: NeuronMasks, qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    zeroed = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    for prefix, keep in awkward_masks.keep.items():
        experts = zeroed.get_submodule(prefix)
        experts.gate_up_proj.data *= torch.cat([keep, keep], 1)[..., None]
        experts.down_proj.data *= keep[:, None, :]
    ids = torch.arange(40)[None]
    before = model(ids).logits
    with applied(awkward_masks, model):
        torch.testing.assert_close(model(ids).logits, zeroed(ids).logits, rtol=0, atol=1e-5)
    assert torch.equal(model(ids).logits, before)


def test_applied_restores_after_an_error(awkward_masks: NeuronMasks, qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), applied(awkward_masks, model):
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_masks_of_another_model_are_refused(awkward_masks: NeuronMasks) -> None:
    shapes = {prefix: tuple(keep.shape) for prefix, keep in awkward_masks.keep.items()}
    awkward_masks.check_fits(shapes, "m")
    with pytest.raises(HeaprError, match=r"the masks lack 1 MoE module\(s\), first model.layers.9"):
        awkward_masks.check_fits(shapes | {"model.layers.9.mlp.experts": (8, 64)}, "m")
    with pytest.raises(HeaprError, match=r"the model lacks 1 MoE module\(s\), first model.layers.0"):
        awkward_masks.check_fits({p: s for p, s in shapes.items() if p != PREFIX}, "m")
    with pytest.raises(HeaprError, match=r"\(8, 48\), the masks have \(8, 64\)"):
        awkward_masks.check_fits(shapes | {PREFIX: (8, 48)}, "m")


def test_damaged_files_are_reported(awkward_masks: NeuronMasks, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    awkward_masks.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(HeaprError, match="is damaged"):
        NeuronMasks.load(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HeaprError, match="is damaged: it keeps"):
        NeuronMasks.load(path)
    with pytest.raises(HeaprError, match="does not exist"):
        NeuronMasks.load(tmp_path / "nothing")
    for worst in ({"weights": {"a": 1.0}, "largest": "much", "bound": 0.1}, {"weights": {"a": 1.0}, "largest": 0.2}):
        NeuronMasks(awkward_masks.keep, {"worst_case": worst}).save(path)
        with pytest.raises(HeaprError, match="is damaged .*worst_case"):
            NeuronMasks.load(path)


def test_newer_format_is_refused(awkward_masks: NeuronMasks, tmp_path: Path) -> None:
    NeuronMasks(awkward_masks.keep, {"format_version": 2}).save(tmp_path / "new")
    with pytest.raises(HeaprError, match="format version 2, this heapr-vllm reads up to 1; upgrade"):
        NeuronMasks.load(tmp_path / "new")
