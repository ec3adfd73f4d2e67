# SPDX-License-Identifier: Apache-2.0
"""Batches: every sample once and in order, and moments that do not depend on how samples share rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune import NeuronMoments, collect_moments
from heapr_vllm.prune.calibration.mix_collector import MixCollector
from heapr_vllm.prune.calibration.moments import NORMS, OUTPUTS, SUMS
from heapr_vllm.prune.calibration.streamed import collect_moments_streamed
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.layered import LayeredModel
from heapr_vllm.prune.models.packing import check_packing
from heapr_vllm.prune.repair.second_moments import collect_second_moments
from heapr_vllm.prune.text.batches import IGNORED, batches
from heapr_vllm.prune.text.samples import Sample, Samples
from tests import tiny_models

LENGTHS = (7, 2, 30, 30, 64)


def samples(lengths: tuple[int, ...] = LENGTHS, sources: tuple[int, ...] | None = None) -> Samples:
    """Random samples of which about half of the tokens count."""
    generator = torch.Generator().manual_seed(3)
    entries = []
    for number, length in enumerate(lengths):
        counted = torch.rand(length, generator=generator) < 0.5
        counted[1] = True
        ids = torch.randint(0, 256, (length,), generator=generator)
        entries.append(Sample(ids, counted, sources[number] if sources else 0))
    return Samples(entries)


@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(9, 30)),
)
def test_every_sample_is_in_one_batch_as_it_is(drawn: list, batch_size: int, packed: int | None) -> None:
    drawn = sorted(drawn, key=lambda pair: pair[1])  # those of a source one after the other
    given = samples(tuple(length for length, _ in drawn), tuple(source for _, source in drawn))
    found = batches(given, batch_size, packed)
    pieces = []
    for batch in found:
        assert batch.first == len(pieces) and len(batch.ids) <= batch_size
        assert packed is not None or (batch.positions is None and batch.samples == len(batch.ids))
        for row in range(len(batch.ids)):
            length = batch.ids.shape[1]
            assert packed is None or length <= packed
            starts = [0] if batch.positions is None else (batch.positions[row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                pieces.append((batch.source, batch.ids[row, start:end], batch.labels[row, start:end]))
        assert batch.done == len(pieces)
    for sample, (source, ids, labels) in zip(given.entries, pieces, strict=True):
        assert source == sample.source and torch.equal(ids, sample.ids)
        counts = labels != IGNORED
        assert (
            not counts[0] and torch.equal(counts[1:], sample.counted[1:]) and torch.equal(labels[counts], ids[counts])
        )


def sum_of_single_samples(model, given: Samples) -> NeuronMoments:
    """What the samples give one by one, with nothing but the model's own forward around them."""
    total: NeuronMoments | None = None
    for sample in given.entries:
        one = collect_moments(model, Samples([sample]))
        if total is None:
            total = one
            continue
        for prefix, layer in total.layers.items():
            for name, values in layer.tensors().items():
                new = getattr(one[prefix], name)
                torch.maximum(values, new, out=values) if name in ("peak_norm", *NORMS) else values.add_(new)
    assert total is not None
    return total


def assert_same(found: NeuronMoments, wanted: NeuronMoments) -> None:
    for prefix, tokens in wanted.tokens.items():
        assert torch.equal(found.tokens[prefix], tokens)
        for name in (*SUMS, *OUTPUTS, *NORMS):
            expected = getattr(wanted[prefix], name)
            torch.testing.assert_close(
                getattr(found[prefix], name), expected, rtol=2e-4, atol=1e-6 * expected.abs().max().item()
            )


OTHERS = ["deepseek", "mixtral", "ernie4_5_moe", "qwen3_5_moe_vl", "glm4_moe"]


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_packed_samples_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    base = tiny_models.save(family, tmp_path / "base")
    model, given = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), samples()
    wanted = sum_of_single_samples(model, given)
    packed = batches(given, 1, 64)
    assert [batch.samples for batch in packed] == [3, 1, 1]
    assert_same(collect_moments(model, packed), wanted)
    assert_same(collect_moments(model, given, 2), wanted)
    layered = LayeredModel(Checkpoint(base))
    assert_same(collect_moments_streamed(layered, packed, ActivationStore(tmp_path / "s")), wanted)
    assert_same(collect_moments_streamed(layered, given, ActivationStore(tmp_path / "s"), 2), wanted)


def test_packing_matters(qwen3: Path) -> None:
    """Otherwise the test above proves nothing: without positions the samples see each other."""
    model, given = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32), samples()
    blind = [replace(batch, positions=None) for batch in batches(given, 1, 64)]
    with pytest.raises(AssertionError):
        assert_same(collect_moments(model, blind), sum_of_single_samples(model, given))


@pytest.mark.parametrize(
    ("family", "is_kept_apart"), [("qwen3_next_linear", False), ("qwen3_next", True), ("qwen3_moe", True)]
)
def test_layers_that_no_mask_keeps_apart_are_refused(family: str, is_kept_apart: bool, tmp_path: Path) -> None:
    tiny_models.config(family).save_pretrained(tmp_path)
    if is_kept_apart:
        check_packing(Checkpoint(tmp_path), "float32")
        return
    with pytest.raises(HeaprError, match="--packing cannot keep samples apart in Qwen3NextForCausalLM"):
        check_packing(Checkpoint(tmp_path), "float32")


def test_a_repair_takes_batches_of_any_kind(qwen3: Path) -> None:
    model, given = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32), samples()
    packed, alone = (collect_second_moments(model, batches(given, 1, length)) for length in (64, None))
    for prefix, experts in alone.items():
        for expert, moment in experts.items():
            assert packed[prefix][expert].tokens == moment.tokens
            largest = moment.sums.abs().max().item()
            torch.testing.assert_close(packed[prefix][expert].sums, moment.sums, rtol=1e-4, atol=1e-5 * largest)


def test_a_process_may_have_none_of_a_source(qwen3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    given = batches(samples((8, 8), (0, 1)))
    whole = collect_moments(model, given, collector=MixCollector(model, ["a", "b"]))
    parts = [collect_moments(model, [batch], collector=MixCollector(model, ["a", "b"])) for batch in given]
    for prefix, layer in whole.layers.items():
        assert not parts[0].sources["b"][prefix].tokens.any() and not parts[1].sources["a"][prefix].tokens.any()
        for part in parts:
            for name in part.sources:
                if part.sources[name][prefix].tokens.any():
                    assert torch.equal(part.sources[name][prefix].fisher, whole.sources[name][prefix].fisher)
        assert torch.equal(layer.tokens, sum(part[prefix].tokens for part in parts))
