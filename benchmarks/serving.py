# SPDX-License-Identifier: Apache-2.0
"""Served tokens/s of a dense and a pruned model in stock vLLM and with the plugin: pruning and engineering apart.

    python -m benchmarks.serving --model Qwen3-30B-A3B --sparsity 0.25 0.5 --csv benchmarks/results/serving.csv
    python -m benchmarks.serving --model Qwen3-30B-A3B --offline --rounds 2
    python -m benchmarks.serving --device cpu --rounds 4 --csv benchmarks/results/serving_cpu_arms.csv
    python -m benchmarks.serving --device cpu --sparsity 0.25 0.25:int8
    python -m benchmarks.serving --dense serving_examples/tiny_qwen3_moe --pruned build/demo/pruned --workload chat

Arms, per round in turn: "dense" in stock vLLM; "zeroed", the same shape with the pruned neurons' weights zero, in stock
vLLM (what an engine without variable widths gets from pruning, at the first sparsity); "unpruned", dense with the
plugin; "pruned" with it. Unpruned over dense is engineering alone, pruned over unpruned is pruning alone, pruned over
dense is both. Ratios are taken round by round. With `--dense` and `--pruned` the zeroed and the unpruned checkpoint are
written to `--work`, each as large as the dense one (a repair of the pruned one is not in them, the speed is the same).

`--model` takes random weights at a published size, on a CPU by default a model of 1.7 GB. The small ones are written to
the disk (`--weights written`), so all arms hold the same numbers and the zeros are real. The others are made up by vLLM
(`--weights dummy`): every arm then has numbers of its own, and there is no zeroed arm, which would be the dense one
again; what zeros save in power on a GPU is not measured then.

Prompts are uniformly random token ids, no two alike, in a round the same for all arms; outputs are sampled at
temperature 1. Each row has the experts hit per layer and decode step and the fraction of neurons that the arm executes,
counted afterwards by `benchmarks.routing` on the prompts of the first round or, for dummy weights, computed for uniform
routing.

On a CPU all servers are up at once (`--no-together`: one at a time), so that a slow moment hits all. On a GPU each has
the device to itself and is started anew for every round. `--offline` runs `vllm bench throughput` alternately, with
prompts of its own. CUDA graphs and every other engine setting stay at vLLM's defaults, equal for all, unless set after
`--`.
"""

import argparse
import re
import signal
import statistics
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benchmarks import routing
from benchmarks.arms import ARMS, Arm, add_models, build_arms, check_memory, pruned_models
from benchmarks.random_models import SMALL, WRITTEN, write_dense
from benchmarks.rows import append_csv
from benchmarks.vllm_server import started, throughput
from benchmarks.workload import WORKLOADS, Workload, tokens_per_second, vocabulary
from heapr_vllm.formats.checkpoint import Checkpoint

SERVE_OPTIONS = ("--no-enable-prefix-caching", "--disable-uvicorn-access-log")

Speeds = dict[str, dict[str, list[float]]]  # workload to arm to output tokens/s per round


def turns(arms: dict[str, Arm], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, arm) in the order of asking, which turns around from round to round."""
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            yield number, name


@contextmanager
def servers(arms: dict[str, Arm], options: list[str], log_dir: Path) -> Generator[dict[str, str]]:
    """Arm to base URL of its server. All start at once; RuntimeError if one does not come up."""
    begin = time.monotonic()
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(
                started(arm.model, *SERVE_OPTIONS, *options, plugins=arm.plugins, log=log_dir / f"{name}.log")
            )
            for name, arm in arms.items()
        }
        urls = {}
        for name, server in running.items():
            urls[name] = server.wait()
            progress(f"{name} is up after {time.monotonic() - begin:.0f} s")
        yield urls


def measure_together(
    arms: dict[str, Arm], workloads: dict[str, Workload], rounds: int, options: list[str], log_dir: Path
) -> Speeds:
    """All servers up for all rounds."""
    speeds: Speeds = {name: {arm: [] for arm in arms} for name in workloads}
    with servers(arms, options, log_dir) as urls:
        for name, workload in workloads.items():
            for number, arm in turns(arms, rounds):
                speeds[name][arm].append(_ask(urls[arm], arms[arm], workload, number))
                progress(f"{name}, round {number + 1}, {arm}: {speeds[name][arm][-1]:.1f} tokens/s")
    return speeds


def measure_apart(
    arms: dict[str, Arm], workloads: dict[str, Workload], rounds: int, options: list[str], log_dir: Path
) -> Speeds:
    """A fresh server per round and arm."""
    speeds: Speeds = {name: {arm: [] for arm in arms} for name in workloads}
    for number, arm in turns(arms, rounds):
        with servers({arm: arms[arm]}, options, log_dir) as urls:
            for name, workload in workloads.items():
                speeds[name][arm].append(_ask(urls[arm], arms[arm], workload, number))
                progress(f"{name}, round {number + 1}, {arm}: {speeds[name][arm][-1]:.1f} tokens/s")
    return speeds


def _ask(url: str, arm: Arm, workload: Workload, number: int) -> float:
    return tokens_per_second(url, arm.model, workload, vocabulary(arm.model), seed=number)


def measure_offline(
    arms: dict[str, Arm], workloads: dict[str, Workload], rounds: int, options: list[str], log_dir: Path
) -> Speeds:
    """A fresh `vllm bench throughput` per round, arm and workload."""
    speeds: Speeds = {name: {arm: [] for arm in arms} for name in workloads}
    for name, workload in workloads.items():
        for number, arm in turns(arms, rounds):
            speeds[name][arm].append(
                throughput(
                    arms[arm].model,
                    *options,
                    plugins=arms[arm].plugins,
                    log=log_dir / f"{arm}.log",
                    num_prompts=workload.num_prompts,
                    input_len=workload.input_len,
                    output_len=workload.output_len,
                )
            )
            progress(f"{name}, round {number + 1}, {arm}: {speeds[name][arm][-1]:.1f} tokens/s")
    return speeds


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def memory(log: Path) -> tuple[str, str]:
    """(GiB of weights, tokens of KV cache) as vLLM logged them, empty where it did not."""
    text = log.read_text()

    def last(pattern: str) -> str:
        matches = re.findall(pattern, text)
        return matches[-1].replace(",", "") if matches else ""

    return last(r"Model loading took ([\d.]+) GiB"), last(r"KV cache size: ([\d,]+) tokens")


def count_routing(
    arms: dict[str, Arm], dense: Path, workloads: dict[str, Workload], device: str
) -> dict[str, dict[str, routing.Routing]]:
    """Workload to arm to its routing, counted if `dense` has weights."""
    masks = {arm.sparsity: arm.masks for arm in arms.values()}
    found = {}
    for name, workload in workloads.items():
        if Checkpoint(dense).has_weights:
            progress(f"counting the routes of {name}")
            by_sparsity = dict(zip(masks, routing.counted(dense, masks.values(), workload, device), strict=True))
        else:
            by_sparsity = dict.fromkeys(masks, routing.uniform(dense, workload.concurrency))
        found[name] = {label: by_sparsity[arm.sparsity] for label, arm in arms.items()}
    return found


def routing_columns(arm: Arm, seen: routing.Routing) -> dict[str, float | str]:
    """`kept`: stored fraction of the neurons, zeros included; `kept_routed`: the same weighted by routing."""
    executed = arm.masks if arm.is_ragged else None
    return {
        "kept": round(1 - executed.sparsity if executed else 1.0, 4),
        "kept_routed": round(seen.kept(executed), 4),
        "experts_hit": round(seen.experts_hit, 2),
        "routing": seen.source,
    }


def speed_columns(arm: str, speeds: dict[str, list[float]]) -> dict[str, float | str]:
    """Median, lowest and highest tokens/s of `arm`, and its ratios to the dense and the unpruned arm."""
    found = speeds[arm]
    return {
        "tok_s": round(statistics.median(found), 1),
        "tok_s_min": round(min(found), 1),
        "tok_s_max": round(max(found), 1),
        **ratios("dense", found, speeds),
        **ratios("unpruned", found, speeds),
    }


def ratios(base: str, found: list[float], speeds: dict[str, list[float]]) -> dict[str, float | str]:
    """Median, lowest and highest of `found` over the speed of `base` in the same round, empty without that arm."""
    values = [mine / theirs for mine, theirs in zip(found, speeds[base], strict=True)] if base in speeds else []
    return {
        f"vs_{base}{suffix}": round(pick(values), 3) if values else ""
        for suffix, pick in (("", statistics.median), ("_min", min), ("_max", max))
    }


def show(row: dict) -> None:
    against = "".join(
        f"{row[f'vs_{base}']:.3f} of {base} ({row[f'vs_{base}_min']:.3f} to {row[f'vs_{base}_max']:.3f}); "
        for base in ("dense", "unpruned")
        if row[f"vs_{base}"]
    )
    print(
        f"{row['model']}, {row['workload']} ({row['input_len']} in, {row['output_len']} out, {row['concurrency']} at "
        f"once), {row['arm']:<12} {row['tok_s']:>8.1f} output tokens/s; {against}{row['rounds']} rounds; "
        f"{row['experts_hit']:.1f} experts per step, {row['kept_routed']:.1%} of neurons executed ({row['routing']})"
    )


def parse() -> argparse.Namespace:
    """The command line with its defaults filled in, `dense` written if it is a model of random weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what vLLM is built for; decides the defaults below",
    )
    add_models(parser)
    parser.add_argument("--weights", choices=("written", "dummy"), help="where the random weights come from")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: decode prefill; CPU: single batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--offline", action="store_true", help="vllm bench throughput instead of vllm serve")
    parser.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        help="all servers at once, on a CPU the default and on a GPU impossible",
    )
    parser.add_argument(
        "--kv-cache", type=float, default=1.0, metavar="GIB", help="of each CPU server; a GPU's takes what is left"
    )
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("options", nargs="*", help="further vLLM options for all, after --")
    args = parser.parse_args()
    if args.device == "cpu" and not (args.dense or args.pruned):
        args.model = args.model or SMALL
    if not args.model and not (args.dense and args.pruned):
        parser.error("name a --model, or --dense and --pruned")
    if args.together is None:
        args.together = args.device == "cpu"
    if args.together and args.device != "cpu":
        parser.error("--together is for CPUs: vLLM takes most of a GPU for one server")
    if args.device == "cpu":
        args.options = ["--kv-cache-memory-bytes", str(int(args.kv_cache * 2**30)), *args.options]
    args.workload = args.workload or (["single", "batch"] if args.device == "cpu" else ["decode", "prefill"])
    if args.model:
        args.weights = args.weights or ("written" if args.model in WRITTEN else "dummy")
        args.dense = write_dense(args.model, args.work, weights=args.weights == "written")
    if args.weights == "dummy":
        args.options = ["--load-format", "dummy", *args.options]
        if "zeroed" in args.arms:
            print("zeroed is left out: weights that vLLM makes up cannot be zeroed, so it would be dense again")
            args.arms = [arm for arm in args.arms if arm != "zeroed"]
    return args


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers, which are in sessions of their own
    args = parse()
    stock = None if args.model == "DeepSeekMoE-16B" else ""  # vLLM alone does not know model_type deepseek
    arms = build_arms(args.arms, args.dense, pruned_models(args), stock, args.work)
    workloads = {name: WORKLOADS[name] for name in args.workload}
    if args.together and not args.offline:
        check_memory(arms, args.kv_cache)
    measure = measure_offline if args.offline else measure_together if args.together else measure_apart
    speeds = measure(arms, workloads, args.rounds, args.options, args.work)
    routes = count_routing(arms, args.dense, workloads, args.device)
    rows = []
    for name, workload in workloads.items():
        for label, arm in arms.items():
            weights, kv_tokens = memory(args.work / f"{label}.log")
            rows.append(
                {
                    "model": args.model or args.dense.name,
                    "workload": name,
                    **workload._asdict(),
                    "arm": label,
                    **speed_columns(label, speeds[name]),
                    "rounds": args.rounds,
                    **routing_columns(arm, routes[name][label]),
                    "weights_gib": weights,
                    "kv_tokens": kv_tokens,
                }
            )
            show(rows[-1])
    if args.csv:
        append_csv(args.csv, rows)


if __name__ == "__main__":
    main()
