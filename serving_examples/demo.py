# SPDX-License-Identifier: Apache-2.0
"""`make demo`: calibrate, prune and export the bundled model, serve it, and compare it with the dense one.

Every step is a command a user would type; it is printed before it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.arms import Arm
from benchmarks.decode import compare
from benchmarks.vllm_server import serve
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples

HERE = Path(__file__).parent
MODEL = HERE / "tiny_qwen3_moe"
SERVE_OPTIONS = ("--max-num-seqs", "32", "--no-enable-prefix-caching", "--disable-uvicorn-access-log")
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
HELD_OUT_BLOCKS, BENCH_ROUNDS, BATCH = 200, 15, 8


def step(*command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def prune(work: Path, sparsity: float) -> tuple[Path, Path]:
    """Folders of the masks and of the compact checkpoint."""
    heapr = Path(sys.executable).with_name("heapr")
    step(sys.executable, HERE / "python_corpus.py", "-o", work / "corpus")
    step(
        heapr,
        "calibrate",
        MODEL,
        "--dataset",
        work / "corpus" / "calibration.jsonl",
        "-o",
        work / "calib",
        "--max-seq-length",
        512,
        "--dtype",
        "float32",
        "--overwrite",
    )
    step(heapr, "prune", work / "calib", "--sparsity", sparsity, "-o", work / "masks", "--overwrite")
    step(heapr, "export", work / "masks", "-o", work / "pruned", "--overwrite")
    step(heapr, "inspect", work / "pruned", "--plot", work / "widths.png")
    return work / "masks", work / "pruned"


def measure_perplexity(work: Path, masks: NeuronMasks) -> tuple[float, float]:
    """Held-out perplexity in fp32, dense and pruned."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    documents = read_documents(str(work / "corpus" / "held_out.jsonl"))
    blocks = token_samples(documents, AutoTokenizer.from_pretrained(MODEL), HELD_OUT_BLOCKS, 512, seed=0)
    dense = perplexity(model, blocks)
    with applied(masks, model):
        return dense, perplexity(model, blocks)


def ask_served(work: Path, pruned: Path) -> None:
    """Starts `vllm serve` on the pruned model and prints an answer of its OpenAI endpoint."""
    print("$ vllm serve", pruned, flush=True)
    with serve(pruned, *SERVE_OPTIONS, log=work / "serve.log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.completions.create(model=str(pruned), prompt=PROMPT, max_tokens=48, temperature=0)
    print(f"\n{PROMPT}\033[1m{answer.choices[0].text}\033[0m\n")


def measure_speed(pruned: Path) -> tuple[float, float]:
    """Median output tokens/s of both models in the same engine, asked in turn."""
    arms = {"dense": Arm(MODEL, ""), "pruned": Arm(pruned, None)}
    dense, ours = (row["speeds"] for row in compare(arms, [BATCH], BENCH_ROUNDS, output_len=256))
    return statistics.median(dense), statistics.median(ours)


def executed_flops(masks: NeuronMasks, tokens: dict[str, list[int]], hidden_size: int, top_k: int) -> float:
    """Routed-expert FLOPs per token: 6 * hidden_size per neuron an average token runs through."""
    neurons = 0.0
    for prefix, counts in tokens.items():
        routed = torch.tensor(counts, dtype=torch.float64)
        neurons += top_k * float((routed * masks.widths[prefix]).sum() / routed.sum())
    return 6 * hidden_size * neurons


def table(
    work: Path, pruned: Path, masks: NeuronMasks, perplexities: tuple[float, float], speeds: tuple[float, float]
) -> str:
    config = Checkpoint(MODEL).config
    tokens = json.loads((work / "calib" / "calibration.json").read_text())["tokens"]
    whole = NeuronMasks({prefix: torch.ones_like(keep) for prefix, keep in masks.keep.items()})
    flops = [executed_flops(m, tokens, config["hidden_size"], config["num_experts_per_tok"]) for m in (whole, masks)]
    rows = [
        ("routed-expert parameters, M", *(routed_parameters(path) / 1e6 for path in (MODEL, pruned)), 2),
        ("weight bytes, MB", *(sizes.num_bytes(Checkpoint(path)) / 1e6 for path in (MODEL, pruned)), 1),
        ("executed expert FLOPs per token, M", flops[0] / 1e6, flops[1] / 1e6, 2),
        ("held-out perplexity (fp32)", *perplexities, 2),
        (f"output tokens/s, batch {BATCH}", *speeds, 0),
    ]
    lines = [f"{'':<38} {'dense':>9} {'pruned':>9} {'change':>8}"]
    lines += [
        f"{name:<38} {dense:>9.{digits}f} {small:>9.{digits}f} {small / dense - 1:>+8.1%}"
        for name, dense, small, digits in rows
    ]
    return "\n".join(lines)


def routed_parameters(path: Path) -> int:
    return sum(
        torch.Size(shape).numel() for name, (_, shape) in Checkpoint(path).headers.items() if ExpertTensor.parse(name)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where everything is written")
    args = parser.parse_args()
    started = time.time()
    masks_dir, pruned = prune(args.work, args.sparsity)
    masks = NeuronMasks.from_pretrained(masks_dir)
    perplexities = measure_perplexity(args.work, masks)
    ask_served(args.work, pruned)
    speeds = measure_speed(pruned)
    print(f"\n{table(args.work, pruned, masks, perplexities, speeds)}\n")
    print(f"took {time.time() - started:.0f} s; everything is in {args.work}. Serve it yourself: vllm serve {pruned}")


if __name__ == "__main__":
    main()
