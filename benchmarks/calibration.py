# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of `collect_moments` on the CPU, of this tree or of several in turn.

    python -m benchmarks.calibration
    python -m benchmarks.calibration --trees ../before . --shapes bundled wide --dtypes bfloat16 --rounds 5

A round starts one process per tree, which imports `heapr_vllm` from there, runs a batch to warm up and then collects
moments of random tokens once. `bundled` is the model in serving_examples, `wide` a random one of two larger layers.
The table gives medians and, in brackets, the lowest and highest: tokens per second of the clock, tokens per second
that the process had the CPU, and how far resident memory rose above that of the loaded model.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from heapr_vllm.prune import collect_moments

BUNDLED = Path(__file__).resolve().parent.parent / "serving_examples" / "tiny_qwen3_moe"
WIDE = Qwen3MoeConfig(
    vocab_size=4096,
    hidden_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
    norm_topk_prob=True,
)
SHAPES = {"bundled": (16, 512), "wide": (2, 2048)}  # samples and their tokens, one sample per batch
FIGURES = ("tokens_per_second", "tokens_per_cpu_second", "memory_mib")


def build(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """Builds or loads the model of a row of the table."""
    if shape == "bundled":
        return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(WIDE, dtype=dtype)


def measure(shape: str, dtype: str) -> dict[str, float]:
    """Collects moments once; FIGURES."""
    model = build(shape, getattr(torch, dtype))
    count, length = SHAPES[shape]
    ids = torch.randint(0, 4096, (count, length), generator=torch.Generator().manual_seed(0))
    collect_moments(model, ids[:1])
    loaded = _reset_peak()
    clock, cpu = time.perf_counter(), time.process_time()
    collect_moments(model, ids)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    memory = (_resident("VmHWM") - loaded) / 1024
    return dict(zip(FIGURES, (ids.numel() / clock, ids.numel() / cpu, memory), strict=True))


def _resident(what: str) -> int:
    """Reads resident memory in kB: VmRSS now, VmHWM at its peak."""
    return int(re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def _reset_peak() -> int:
    """Lets VmHWM start anew; returns what is resident now in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def measure_tree(tree: Path, shape: str, dtype: str) -> dict[str, float]:
    """Does `measure` in a process that takes `heapr_vllm` from `tree`."""
    result = subprocess.run(
        [sys.executable, __file__, "--once", shape, dtype],
        env=os.environ | {"PYTHONPATH": str(tree.resolve())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path(__file__).resolve().parent.parent])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", nargs=2, metavar=("SHAPE", "DTYPE"), help="print the figures of one run")
    args = parser.parse_args(arguments)
    if args.once:
        print(json.dumps(measure(*args.once)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("shape    dtype     tree              " + "".join(f"{name:>27}" for name in FIGURES))
    for shape in args.shapes:
        for dtype in args.dtypes:
            runs: dict[Path, list[dict[str, float]]] = defaultdict(list)
            for _ in range(args.rounds):
                for tree in args.trees:
                    runs[tree].append(measure_tree(tree, shape, dtype))
            for tree, rows in runs.items():
                columns = "".join(f"{_spread([row[name] for row in rows]):>27}" for name in FIGURES)
                print(f"{shape:<9}{dtype:<10}{tree.resolve().name:<18}{columns}", flush=True)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


if __name__ == "__main__":
    main()
