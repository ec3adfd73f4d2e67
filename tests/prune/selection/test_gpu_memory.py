# SPDX-License-Identifier: Apache-2.0
"""`--gpu-memory`: the key-value cache is what vLLM allocates, and what is left is the budget."""

import json
import re
from pathlib import Path

import pytest

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.report.summary import load_report
from heapr_vllm.prune.selection.gpu_memory import RESERVED, UTILIZATION, GpuMemory, cache_bytes_per_token

QWEN3_30B = {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "torch_dtype": "bfloat16"}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "dtype": "bfloat16",
}


def test_published_models() -> None:
    assert cache_bytes_per_token(QWEN3_30B) == 96 * 1024
    assert cache_bytes_per_token(DEEPSEEK_V3) == 61 * 576 * 2
    half = {**QWEN3_30B, "layer_types": ["linear_attention", "full_attention"] * 24}
    assert cache_bytes_per_token({"text_config": half}) == 48 * 1024
    with pytest.raises(HeaprError, match="does not say how large the key-value cache is; use --target-size"):
        cache_bytes_per_token({"num_hidden_layers": 2})


def test_what_requests_leave() -> None:
    memory = GpuMemory(total=80 * 2**30, max_model_len=32760, max_num_seqs=8)
    assert memory.cache(QWEN3_30B) == 8 * 32768 * 96 * 1024 == 24 * 2**30
    assert memory.weights(QWEN3_30B) == int(UTILIZATION * 80 * 2**30) - RESERVED - 24 * 2**30
    assert "24.00 GiB of key-value cache for 8 x 32,760 tokens" in memory.describe(QWEN3_30B)
    with pytest.raises(HeaprError, match="no room for weights; lower --max-num-seqs or --max-model-len"):
        GpuMemory(total=24 * 2**30, max_model_len=32768, max_num_seqs=64).weights(QWEN3_30B)


def test_command(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The tiny model fits any GPU, so what is reserved is asked for, and a little."""
    memory = int((RESERVED + 2**20) / UTILIZATION)
    command = ["prune", str(calibration), "-o", str(tmp_path / "masks"), "--gpu-memory", str(memory)]
    assert main(command) == 2 and "add --max-model-len and --max-num-seqs" in capsys.readouterr().err
    assert main([*command, "--max-model-len", "64", "--max-num-seqs", "2"]) == 0
    config = Checkpoint(calibration).config
    left = GpuMemory(total=memory, max_model_len=64, max_num_seqs=2).weights(config)
    found = load_report(tmp_path / "masks").compact_bytes
    assert found is not None and left - 2**16 < found <= left


@pytest.mark.vllm
def test_vllm_allocates_as_much(qwen3: Path, tmp_path: Path) -> None:
    """A GiB of cache holds as many tokens as it says, to one block of 128."""
    pytest.importorskip("vllm")
    from tests.model_executor import engine

    process = engine.run(qwen3, dtype="bfloat16", env={"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "INFO"})
    match = re.search(r"KV cache size: ([\d,]+) tokens", process.stdout + process.stderr)
    assert match, (process.stdout + process.stderr)[-2000:]
    config = {**json.loads((qwen3 / "config.json").read_text()), "dtype": "bfloat16"}
    assert abs(int(match[1].replace(",", "")) - 2**30 / cache_bytes_per_token(config)) <= 128
