# SPDX-License-Identifier: Apache-2.0
"""Memory of a pruned model's weights, per rank: as many bytes as are kept, and not much more on the way there."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from tests import quantized_models, tiny_models
from tests.conftest import prune
from tests.model_executor import engine

pytestmark = pytest.mark.vllm
HIDDEN, EXPERTS, WIDTH, LAYERS = 512, 32, 768, 4  # 302 MB of experts in bfloat16, 0.6 MB of everything else
COMPILED = {"HEAPR_CPU_KERNEL": "compiled"}  # the op that stores experts at their own widths
OVERHEAD = 20e6  # what else stays resident: modules imported while loading, masks, a gathered tensor


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in shards of 25 MB, `masks` that keep half of it, `compact`."""
    folder = tmp_path_factory.mktemp("memory")
    config = tiny_models.config("qwen3_moe")
    config.update(
        {
            "hidden_size": HIDDEN,
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="25MB")
    tiny_models.tokenizer().save_pretrained(folder / "base")
    prune(folder / "base", corpus, folder, sparsity=0.5, num_samples=1)
    return folder


@pytest.mark.parametrize(
    ("name", "load_format", "parallel"),
    [
        ("compact", "auto", ""),
        ("masks", "heapr", "EP=2"),
        *(pytest.param("compact", "auto", ranks, marks=pytest.mark.slow) for ranks in ("TP=2", "EP=2")),
        *(pytest.param("masks", "heapr", ranks, marks=pytest.mark.slow) for ranks in ("", "TP=2")),
    ],
)
def test_loading(name: str, load_format: str, parallel: str, folder: Path) -> None:
    """Resident memory counts mapped pages of checkpoint shards too, although the kernel may drop them."""
    ranks = 2 if parallel else 1
    process = engine.run(
        folder / name,
        steps=("loading",),
        dtype="bfloat16",
        load_format=load_format,
        tensor_parallel_size=ranks,
        enable_expert_parallel=parallel == "EP=2",
        worker_cls="tests.model_executor.measured_worker.Worker",
        env=COMPILED | (engine.TWO_RANKS if parallel else {}),
    )
    masks = NeuronMasks.from_pretrained(folder / "masks")
    kept = masks.num_kept * 3 * HIDDEN * torch.bfloat16.itemsize / ranks
    shard = max(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    (found,) = engine.results(process)
    assert len(found) == ranks
    for rank in found:
        assert rank["experts"] == pytest.approx(kept, rel=0.02)
        assert rank["resident"] < rank["parameters"] + OVERHEAD
        assert rank["peak"] < rank["parameters"] + OVERHEAD + shard, "a shard at most above what stays"


@pytest.fixture(scope="module")
def fp8(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` like DeepSeek-V3, its experts in FP8, `masks` that keep three quarters of it, `compact`."""
    folder = tmp_path_factory.mktemp("fp8")
    config = tiny_models.config("deepseek_v3")
    config.update({"hidden_size": HIDDEN, "n_routed_experts": 16, "moe_intermediate_size": 1024})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "plain")
    tiny_models.tokenizer().save_pretrained(folder / "plain")
    quantized_models.quantized(folder / "plain", folder / "base", "fp8-released")
    prune(folder / "base", corpus, folder, sparsity=0.25, num_samples=1)
    return folder


def expert_bytes(checkpoint: Path) -> int:
    opened = Checkpoint(checkpoint)
    return sum(sizes.tensor_bytes(opened, name) for name in opened.headers if ".experts." in name)


@pytest.mark.parametrize(("name", "load_format"), [("compact", "auto"), ("masks", "heapr")])
def test_pruning_an_fp8_model_makes_it_smaller(name: str, load_format: str, fp8: Path) -> None:
    """A quarter of the neurons gone, a scale per neuron and 128 of H instead of one per block: 0.78 of the base."""
    base = expert_bytes(fp8 / "base")
    assert expert_bytes(fp8 / "compact") <= 0.78 * base
    process = engine.run(
        fp8 / name,
        steps=("loading",),
        dtype="bfloat16",
        load_format=load_format,
        worker_cls="tests.model_executor.measured_worker.Worker",
        env=COMPILED,
    )
    ((rank,),) = engine.results(process)
    assert rank["experts"] <= 0.78 * base
