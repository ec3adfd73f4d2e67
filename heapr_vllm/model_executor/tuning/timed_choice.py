# SPDX-License-Identifier: Apache-2.0
"""Which of several kernels runs a model: the one that is fastest here, timed once per machine and kept in a file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import operator
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import vllm
import vllm.envs as envs
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.schema import read_json
from heapr_vllm.model_executor.kernels.base import RaggedKernel
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.model_executor.tuning.kernel_timing import TOKENS, TimedLayer, time_kernels

ENGINES_OWN = "native"
TOLERANCE = 1.1  # times as long as the engine's own op, at any token count, is not taken
CLEARLY = 0.97  # of the time of a kernel that is preferred, to be taken in its place
logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


@dataclass(frozen=True)
class Timing:
    """What was measured, as kept in a file.

    machine: what it was measured on. seconds: per call at each of `tokens`, by kernel.
    """

    machine: dict[str, str | int]
    layer: dict[str, str | int | bool | list[int]]
    tokens: list[int]
    seconds: dict[str, list[float]]


def choose_kernel(kernels: Sequence[RaggedKernel], layer: TimedLayer) -> RaggedKernel:
    """Returns the fastest of `kernels`, which are in the order of preference, without timing if there is one only.

    The first rank of a tensor-parallel group decides for all: they wait for it.
    """
    if len(kernels) == 1:
        return kernels[0]
    group = get_tp_group()
    name = fastest(timed(tuple(kernels), layer).seconds) if group.rank_in_group == 0 else None
    name = group.broadcast_object(name, src=0)
    return next(kernel for kernel in kernels if kernel.name == name)


def fastest(seconds: dict[str, list[float]]) -> str:
    """Picks the kernel with the least geometric mean of the times, which are by kernel in the order of preference.

    None that is slower than the engine's own op at one of the token counts, and another than the first only if it is
    clearly faster.
    """
    limit = [TOLERANCE * own for own in seconds.get(ENGINES_OWN, ())]
    allowed = [name for name, own in seconds.items() if not limit or all(map(operator.le, own, limit))]
    best = allowed[0]
    for name in allowed[1:]:
        if _mean(seconds[name]) < CLEARLY * _mean(seconds[best]):
            best = name
    return best


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@cache
def timed(kernels: tuple[RaggedKernel, ...], layer: TimedLayer) -> Timing:
    """Times `kernels` on `layer`, or reads what a former process has found here; says in one line what it was."""
    folder = Path(envs.VLLM_CACHE_ROOT) / "heapr" / "kernels"
    machine = machine_key()
    described = asdict(layer) | {"dtype": str(layer.dtype), "widths": list(layer.widths)}
    key = json.dumps([machine, described, list(TOKENS), [kernel.name for kernel in kernels]])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    start = time.perf_counter()
    with _one_at_a_time(folder):
        timing = _read(path)
        how = f"as timed here before ({path})"
        if timing is None:
            timing = Timing(machine, described, list(TOKENS), time_kernels(layer, kernels))
            how = f"timed in {time.perf_counter() - start:.1f} s"
            _write(path, timing)
    logger.info("experts run on kernel %s; %s, %s", fastest(timing.seconds), _described(timing), how)
    return timing


@contextmanager
def _one_at_a_time(folder: Path) -> Generator[None]:
    """Other processes wait, for timings that they would disturb and can then read; where nothing can be kept, not."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Timing | None:
    """None if there is no file, or it is damaged."""
    with suppress(OSError, HeaprError):
        return read_json(path, Timing, "it is made again")
    return None


def _write(path: Path, timing: Timing) -> None:
    text = json.dumps(asdict(timing), indent=2) + "\n"
    with suppress(OSError):
        atomic_file(path, lambda partial: partial.write_text(text))


def machine_key() -> dict[str, str | int]:
    """What times depend on apart from the layer."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "kernel": build.library_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _described(timing: Timing) -> str:
    """Times in microseconds by kernel, at each token count."""
    parts = []
    for name, seconds in timing.seconds.items():
        parts.append(f"{name} {' / '.join(f'{1e6 * each:.0f}' for each in seconds)}")
    return (
        f"{', '.join(parts)} us for {' / '.join(map(str, timing.tokens))} tokens on {timing.machine['threads']} threads"
    )
