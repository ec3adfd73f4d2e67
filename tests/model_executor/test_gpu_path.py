# SPDX-License-Identifier: Apache-2.0
"""The path of a GPU, end to end on a CPU: engines whose pruned layers run the Triton kernels in Triton's interpreter.

Loading, shares, packing, tables, routing and launches are those of a GPU; only what executes the kernels is not. The
oracle is stock vLLM on the same weights with the pruned neurons zeroed, in fp32. Interpreted kernels are slow, so few
tokens are asked for.
"""

from itertools import chain
from pathlib import Path

import pytest

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune import export_checkpoint
from tests import quantized_models
from tests.conftest import BUNDLED, prune
from tests.model_executor import engine
from tools import families

pytestmark = pytest.mark.vllm
UNIT = 64  # neurons of a slab
INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
TRITON = {"HEAPR_KERNEL": "triton", "TRITON_INTERPRET": "1", **INSPECT}


@pytest.fixture(scope="module")
def bundled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`masks`, `compact` and `zeroed` of the bundled model, a quarter pruned, and both again with experts in 4 bits."""
    folder = tmp_path_factory.mktemp("bundled")
    prune(BUNDLED, corpus, folder, sparsity=0.25)
    export_checkpoint(folder / "masks", folder / "zeroed", layout="zeroed")
    export_checkpoint(folder / "masks", folder / "int4", quantize="int4")
    scheme = ExpertScheme.for_hidden_size("int4", Checkpoint(BUNDLED).hidden_size)
    values = quantized_models.rounded(BUNDLED, folder / "values", scheme)
    export_checkpoint(folder / "masks", folder / "zeroed values", layout="zeroed", model=str(values))
    return folder


@pytest.fixture(scope="module")
def awkward(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compact` and `zeroed` of a tiny model whose experts keep 0, 1, an odd number and all neurons."""
    folder = tmp_path_factory.mktemp("awkward")
    for layout in ("compact", "zeroed"):
        export_checkpoint(masks_repository, folder / layout, layout=layout)
    return folder


@pytest.fixture(scope="module")
def kept(bundled: Path) -> list[list[int]]:
    """Widths of the bundled model's experts by layer."""
    return [widths.tolist() for widths in NeuronMasks.from_pretrained(bundled / "masks").widths.values()]


def answers(ask: str, env: dict[str, str], variants: dict[str, dict]) -> dict:
    """Output of an engine in fp32 per variant."""
    in_fp32 = {name: {"dtype": "float32", **arguments} for name, arguments in variants.items()}
    return engine.answer_many(in_fp32, env=env, ask=ask)


@pytest.fixture(scope="module")
def stock(bundled: Path, awkward: Path) -> dict:
    return answers(
        "generate_little",
        {"VLLM_PLUGINS": "", **INSPECT},
        {
            "bundled": {"model": str(bundled / "zeroed")},
            "awkward": {"model": str(awkward / "zeroed")},
            "int4": {"model": str(bundled / "zeroed values")},
        },
    )


@pytest.fixture(scope="module")
def one_rank(bundled: Path, awkward: Path) -> dict:
    override = {"quantization_config": {"quant_method": "heapr", "masks": str(bundled / "masks")}}
    return answers(
        "generate_little_twice",
        TRITON,
        {
            "compact": {"model": str(bundled / "compact")},
            "masks over base": {"model": str(BUNDLED), "hf_overrides": override},
            "awkward widths": {"model": str(awkward / "compact")},
            "int4": {"model": str(bundled / "int4")},
        },
    )


@pytest.fixture(scope="module")
def two_ranks(bundled: Path) -> list[dict] | str:
    output = answers(
        "generate_little",
        TRITON | engine.TWO_RANKS,
        {"TP=2": {"model": str(bundled / "compact"), "tensor_parallel_size": 2}},
    )["TP=2"]
    return output if isinstance(output, str) else [output]


def assert_same(found: list[dict] | str, expected: dict | str) -> None:
    """`found`: one output, or two, before and after `reload_weights`."""
    assert not isinstance(expected, str), f"stock vLLM: {expected}"
    assert not isinstance(found, str), found
    assert not any(expected["layers"]), "the oracle ran the plugin"
    for output in found:
        assert {kernel for kernel, *_ in chain(*output["layers"])} == {"triton"}
        assert output["ids"] == expected["ids"]
        assert families.distance(output, expected) < families.TOLERANCE


@pytest.mark.parametrize("mode", ["compact", "masks over base"])
def test_output_equals_stock(mode: str, one_rank: dict, stock: dict) -> None:
    assert_same(one_rank[mode], stock["bundled"])


def test_output_equals_stock_with_awkward_widths(one_rank: dict, stock: dict) -> None:
    assert_same(one_rank["awkward widths"], stock["awkward"])


def test_output_equals_stock_in_4_bits(one_rank: dict, stock: dict) -> None:
    assert_same(one_rank["int4"], stock["int4"])


@pytest.mark.slow
def test_output_equals_stock_on_two_ranks(two_ranks: list[dict], stock: dict) -> None:
    assert_same(two_ranks, stock["bundled"])


@pytest.mark.parametrize("mode", ["compact", "masks over base"])
def test_experts_are_stored_at_different_widths(mode: str, one_rank: dict, kept: list[list[int]]) -> None:
    """Otherwise equal outputs prove little."""
    (layers,) = one_rank[mode][0]["layers"]
    assert [own for _, own, _ in layers] == kept
    assert all(set(stored) == {UNIT, 2 * UNIT} for *_, stored in layers)


@pytest.mark.slow
def test_ranks_share_experts_in_whole_slabs(two_ranks: list[dict], kept: list[list[int]]) -> None:
    """Only an expert's last slab is padded: of experts wider than a slab one rank has a full one."""
    first, second = two_ranks[0]["layers"]
    for widths, (_, some, stored), (_, others, stored_there) in zip(kept, first, second, strict=True):
        assert {*stored, *stored_there} == {UNIT}
        for width, *shares in zip(widths, some, others, strict=True):
            assert sum(shares) == width and max(shares) == min(width, UNIT)
