# SPDX-License-Identifier: Apache-2.0
"""`heapr calibrate --stream` on a model with more bytes of weights than the process may have of address space."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.calibration.dry_run import peak_resident_bytes
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE, NeuronMoments
from tests import tiny_models

MIB = 2**20
LIMIT = 1600 * MIB  # `ulimit -v`; Python, torch and transformers alone take 1000 MiB of it
CONFIG = Qwen3MoeConfig(
    vocab_size=tiny_models.VOCAB,
    hidden_size=1024,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    max_position_embeddings=512,
    eos_token_id=256,
    dtype="float32",
    architectures=["Qwen3MoeForCausalLM"],
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 GiB of random fp32 weights, one shard per layer, written without ever being in memory as a whole."""
    path = tmp_path_factory.mktemp("large") / "base"
    CONFIG.save_pretrained(path)
    tiny_models.tokenizer().save_pretrained(path)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"{layer[1] if layer else 'rest'}.safetensors", {})[name] = tensor
    weight_map = {}
    for shard, shapes in shards.items():
        tensors = dict(part for name, tensor in shapes.items() for part in random_parts(name, tensor.shape))
        save_file(tensors, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def random_parts(name: str, shape: torch.Size):
    """Random values under the names of a Qwen3-MoE checkpoint, which holds experts one by one."""
    if ".experts." not in name:
        yield name, torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(std=0.02)
        return
    prefix, _, stack = name.rpartition(".")
    for expert in range(shape[0]):
        for projection in ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",):
            rows = shape[1] // 2 if stack == "gate_up_proj" else shape[1]
            yield f"{prefix}.{expert}.{projection}.weight", torch.empty(rows, shape[2]).normal_(std=0.02)


def limited(output: Path, *arguments: str) -> tuple[int, str, int]:
    """Exit code, output and peak resident bytes of the `heapr` command in LIMIT bytes of address space."""
    command = ["bash", "-c", f'ulimit -v {LIMIT // 1024}; exec "$@"', "bash", sys.executable, "-m", "heapr_vllm"]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    peak = 0
    with output.open("w") as file:
        process = subprocess.Popen([*command, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, peak_resident_bytes(process.pid))
            time.sleep(0.02)
    return process.returncode, output.read_text(), peak


@pytest.mark.slow
def test_model_larger_than_the_memory_limit(large: Path, corpus: Path, tmp_path: Path) -> None:
    assert sizes.num_bytes(Checkpoint.resolve(large)) > LIMIT
    arguments = [
        "calibrate",
        str(large),
        "--dataset",
        str(corpus),
        "-o",
        str(tmp_path / "calib"),
        "--num-calibration-samples",
        "2",
        "--max-seq-length",
        "64",
    ]
    code, output, _ = limited(tmp_path / "whole.txt", *arguments)
    assert code != 0 and re.search("allocate memory|MemoryError", output), "the limit is not one for the whole model"
    code, output, _ = limited(tmp_path / "plan.txt", *arguments, "--stream", "--dry-run")
    assert code == 0, output
    predicted = float(re.search(r"peak memory bytes +([\d,.]+) MiB", output)[1].replace(",", "")) * MIB
    code, output, peak = limited(tmp_path / "streamed.txt", *arguments, "--stream")
    assert code == 0, output
    assert 0 < peak < predicted < LIMIT
    moments = NeuronMoments.load(tmp_path / "calib" / MOMENTS_FILE)
    assert {int(tokens.sum()) for tokens in moments.tokens.values()} == {2 * 64 * 2}
    print(f"limit {LIMIT / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, predicted {predicted / MIB:.0f} MiB")
