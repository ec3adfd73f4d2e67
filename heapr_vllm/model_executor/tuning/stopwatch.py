# SPDX-License-Identifier: Apache-2.0
"""Times a sequence of calls: as one CUDA graph between two events on a GPU, by the clock anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def stopwatch(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """A function that runs all `calls` in order and returns the seconds per call.

    Every call runs once beforehand, so that compilation is over. On a GPU the calls are captured in a CUDA graph: they
    must not synchronise with the host, and what they allocate is reused from replay to replay.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return lambda: _run(calls) / len(calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return replay


def _run(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def interleave(stopwatches: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call in every round and arm; the order turns around from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in stopwatches}
    for number in range(rounds):
        for name in list(stopwatches)[:: -1 if number % 2 else 1]:
            seconds[name].append(stopwatches[name]())
    return seconds
