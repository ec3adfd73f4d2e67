# SPDX-License-Identifier: Apache-2.0
"""The arms of a served comparison: which checkpoint runs in which vLLM."""

import argparse
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.random_models import CONFIGS, random_masks
from benchmarks.variants import keep_all, write_pruned, write_zeroed
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.quantized import ExpertScheme

ARMS = ("dense", "zeroed", "unpruned", "pruned")
RECORDED = "recorded"  # unpruned, with its traffic
SERVER_GIB = 1.75  # resident memory of a CPU server's processes beside weights and KV cache


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `pruned_models` reads."""
    parser.add_argument("--model", choices=CONFIGS, help="random weights at this model's size")
    parser.add_argument(
        "--sparsity",
        type=sparsity,
        nargs="+",
        default=[(0.25, None)],
        metavar="R[:int8|:fp8]",
        help="with --model: what its pruned versions remove, and store experts as",
    )
    parser.add_argument("--dense", type=Path, help="a checkpoint instead")
    parser.add_argument("--pruned", type=Path, nargs="+", help="its pruned versions")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="models and logs")


def sparsity(text: str) -> tuple[float, str | None]:
    """Parses 0.25 or 0.25:int8, for argparse."""
    ratio, _, storage = text.partition(":")
    if storage not in ("", "int8", "fp8"):
        raise argparse.ArgumentTypeError(f"experts can be stored as int8 or fp8, not {storage}")
    return float(ratio), storage or None


def pruned_models(args: argparse.Namespace) -> dict[str, tuple[NeuronMasks, Path]]:
    """Label to masks and checkpoint of what is compared with `args.dense`."""
    if args.model:
        return _random_models(args)
    models: dict[str, tuple[NeuronMasks, Path]] = {}
    for path in args.pruned:
        masks, checkpoint = NeuronMasks.from_pretrained(path), Checkpoint(path)
        label = _label(masks.sparsity, checkpoint.expert_scheme)
        if label in models:
            raise SystemExit(f"two of the pruned models are {label} sparse; name one of them")
        if not checkpoint.has_weights:
            path = write_pruned(args.dense, masks, args.work / f"pruned-{label}")
        models[label] = masks, path
    return models


def _random_models(args: argparse.Namespace) -> dict[str, tuple[NeuronMasks, Path]]:
    models: dict[str, tuple[NeuronMasks, Path]] = {}
    hidden_size = CONFIGS[args.model]["hidden_size"]
    for ratio, storage in args.sparsity:
        masks = random_masks(CONFIGS[args.model], ratio)
        scheme = ExpertScheme.for_hidden_size(storage, hidden_size) if storage else None
        label = _label(masks.sparsity, scheme)
        models[label] = masks, write_pruned(args.dense, masks, args.work / f"pruned-{label}", scheme)
    return models


def _label(sparsity: float, scheme: ExpertScheme | None) -> str:
    return f"{sparsity:.0%}{f' {scheme.name}' if scheme else ''}"


class Arm(NamedTuple):
    """`plugins`: VLLM_PLUGINS, "" for stock vLLM and None for all. `masks`: of the neurons whose outputs are zero.

    `is_ragged`: whether only what `masks` keep is stored and executed. `traffic`: where HEAPR_TRAFFIC records it.
    """

    model: Path
    plugins: str | None
    masks: NeuronMasks | None = None
    is_ragged: bool = False
    traffic: Path | None = None

    @property
    def sparsity(self) -> float:
        return self.masks.sparsity if self.masks else 0.0


def build_arms(
    chosen: list[str], dense: Path, pruned: dict[str, tuple[NeuronMasks, Path]], stock: str | None, work: Path
) -> dict[str, Arm]:
    """Arms by name, writing the checkpoints that some need. `pruned`: label to masks and checkpoint."""
    label, (masks, _) = next(iter(pruned.items()))
    arms = {}
    if "dense" in chosen:
        arms["dense"] = Arm(dense, stock)
    if "zeroed" in chosen:
        arms[f"zeroed {label}"] = Arm(write_zeroed(dense, masks, work / f"zeroed-{label}"), stock, masks)
    if {"unpruned", RECORDED} & set(chosen):
        unpruned = Arm(write_pruned(dense, keep_all(masks), work / "unpruned"), None)
        recorded = unpruned._replace(traffic=work / "traffic")
        arms |= {name: arm for name, arm in (("unpruned", unpruned), (RECORDED, recorded)) if name in chosen}
    if "pruned" in chosen:
        arms |= {f"pruned {name}": Arm(path, None, own, True) for name, (own, path) in pruned.items()}
    return arms


def needed_gib(arms: dict[str, Arm], kv_cache_gib: float) -> float:
    """Memory of CPU servers of all arms at once: weights, processes, and a KV cache each."""
    weights = sum(file.stat().st_size for arm in arms.values() for file in arm.model.glob("*.safetensors"))
    return weights / 2**30 + len(arms) * (kv_cache_gib + SERVER_GIB)


def check_memory(arms: dict[str, Arm], kv_cache_gib: float) -> None:
    """Raises SystemExit if servers of all arms do not fit into the memory that is free now."""
    need, free = needed_gib(arms, kv_cache_gib), psutil.virtual_memory().available / 2**30
    if need > free:
        raise SystemExit(
            f"{len(arms)} servers at once need about {need:.1f} GiB, {free:.1f} GiB are free; name fewer "
            "--sparsity or --arms, give each less --kv-cache, or --no-together for one server at a time"
        )
