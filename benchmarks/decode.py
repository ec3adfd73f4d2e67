# SPDX-License-Identifier: Apache-2.0
"""Decode speed of a dense model in stock vLLM and of its versions with the plugin, engines asked in turn, without HTTP.

    python -m benchmarks.decode --dense serving_examples/tiny_qwen3_moe --pruned build/demo/pruned
    python -m benchmarks.decode --model Qwen3-30B-A3B-2-layers --sparsity 0.25 0.25:int8 0.5:int8 --batch 1 16 64

Each engine is a process of its own that sleeps while the others work; a round is one `LLM.generate` of each, in
alternating order. Arms are those of `benchmarks.serving`, which measures the same through `vllm serve`, with the front
end's noise; "recorded" is unpruned with HEAPR_TRAFFIC. `--busy 1` takes a part of the cores away, as on a machine that
does something else too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks.arms import ARMS, RECORDED, Arm, add_models, build_arms, pruned_models
from benchmarks.random_models import write_dense

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
MAX_MODEL_LEN = 512


def work(model: str) -> None:
    """Engine process: answers `[batch, output_len]` lines on standard input with seconds on the original output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to standard error
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, output_len = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=[7 + i, 11, 13, 17]) for i in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(time.perf_counter() - start, file=answers, flush=True)


def occupy(stack: ExitStack) -> None:
    """A process that wants a whole core."""
    process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
    stack.callback(process.kill)


def start(stack: ExitStack, arm: Arm) -> subprocess.Popen:
    env = {**ENVIRONMENT, **os.environ}
    if arm.plugins is not None:
        env["VLLM_PLUGINS"] = arm.plugins
    if arm.traffic:
        env["HEAPR_TRAFFIC"] = str(arm.traffic)
    command = [sys.executable, "-m", "benchmarks.decode", "--worker", str(arm.model)]
    process = stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
    )
    stack.callback(process.kill)
    if _line(process).strip() != "ready":
        raise RuntimeError(f"the engine of {arm.model} did not start; try: {' '.join(command)}")
    return process


def _line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def ask(process: subprocess.Popen, batch: int, output_len: int) -> float:
    """Output tokens/s of one generation."""
    print(json.dumps([batch, output_len]), file=process.stdin, flush=True)
    return batch * output_len / float(_line(process))


def compare(arms: dict[str, Arm], batches: list[int], rounds: int, output_len: int) -> Iterator[dict[str, Any]]:
    """Per batch size and arm: output tokens/s of every round, and sorted ratios to the first arm, round by round."""
    with ExitStack() as stack:
        engines = {name: start(stack, arm) for name, arm in arms.items()}
        for batch in batches:
            speeds: dict[str, list[float]] = {name: [] for name in engines}
            for number in range(-2, rounds):
                for name in list(engines)[:: -1 if number % 2 else 1]:
                    speed = ask(engines[name], batch, output_len)
                    if number >= 0:
                        speeds[name].append(speed)
            first = speeds[next(iter(arms))]
            for name, found in speeds.items():
                ratios = sorted(mine / theirs for mine, theirs in zip(found, first, strict=True))
                yield {"batch": batch, "arm": name, "speeds": found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, RECORDED), default=["dense", "unpruned", "pruned"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--busy", type=int, default=0, help="processes that do nothing but keep a core busy")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    if args.model:
        args.dense = write_dense(args.model, args.work, weights=True)
    elif not (args.dense and args.pruned):
        parser.error("name a --model, or --dense and --pruned")
    arms = build_arms(args.arms, args.dense, pruned_models(args), "", args.work)
    with ExitStack() as stack:
        for _ in range(args.busy):
            occupy(stack)
        for row in compare(arms, args.batch, args.rounds, args.output_len):
            show(row)


def show(row: dict[str, Any]) -> None:
    ratios, quarter = row["ratios"], len(row["ratios"]) // 4
    print(
        f"batch {row['batch']:>3}, {row['arm']:<12} {statistics.median(row['speeds']):>8.1f} tokens/s, "
        f"{statistics.median(ratios):.3f} of dense (middle half of {len(ratios)} rounds {ratios[quarter]:.3f} to "
        f"{ratios[-1 - quarter]:.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
