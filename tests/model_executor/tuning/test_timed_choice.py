# SPDX-License-Identifier: Apache-2.0
"""The kernel is the one that is fastest: by a clock that the test turns, and on this machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes
from heapr_vllm.model_executor.kernels.choice import candidates
from heapr_vllm.model_executor.kernels.op import register_op
from heapr_vllm.model_executor.tuning import stopwatch, timed_choice
from heapr_vllm.model_executor.tuning.kernel_timing import TOKENS, TimedLayer, time_kernels
from heapr_vllm.model_executor.tuning.timed_choice import choose_kernel, fastest

LAYER = TimedLayer.of([16, 32, 48, 64] * 4, 8, 2, 64, torch.float32)


class Clock:
    """Stands for `time` in `stopwatch.py`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Kernel(RaggedKernel):
    """Takes as long as it is told."""

    def __init__(self, name: str, clock: Clock, milliseconds: tuple[float, ...]) -> None:
        self.name = name
        self.clock = clock
        self.milliseconds = dict(zip(map(LAYER.num_tokens, TOKENS), milliseconds, strict=True))
        self.runs = 0

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        self.clock.now += self.milliseconds[len(x)] / 1e3
        self.runs += 1

    run_in_graph = run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """A clock that only kernels turn, an empty cache, a single rank."""
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(timed_choice.envs, "VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    one = SimpleNamespace(rank_in_group=0, broadcast_object=lambda name, src: name)
    monkeypatch.setattr(timed_choice, "get_tp_group", lambda: one)
    timed_choice.timed.cache_clear()
    return clock


def kept_files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("compiled", "native", "buckets", "expected"),
    [
        ((1, 10, 50), (2, 20, 60), (3, 15, 70), "compiled"),
        ((2, 20, 60), (1, 10, 50), (3, 15, 70), "native"),
        ((2, 20, 60), (2, 20, 60), (1, 10, 50), "buckets"),
        ((1, 5, 70), (2, 20, 60), (2, 20, 61), "native"),  # much faster but once, where it is slower than the engine
        ((1, 5, 65), (2, 20, 60), (2, 20, 61), "compiled"),  # which may be noise
        ((1, 10, 50), (1, 9.9, 50), (1, 10, 50), "compiled"),  # as fast: the first is preferred
    ],
)
def test_the_fastest_is_chosen(clock: Clock, compiled: tuple, native: tuple, buckets: tuple, expected: str) -> None:
    times = {"compiled": compiled, "native": native, "buckets": buckets}
    kernels = [Kernel(name, clock, milliseconds) for name, milliseconds in times.items()]
    assert choose_kernel(kernels, LAYER).name == expected


def test_timed_once_per_machine(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is kept; another thread count, or a damaged file, has it timed again."""
    slow, quick = Kernel("compiled", clock, (2, 2, 2)), Kernel("native", clock, (1, 1, 1))
    assert choose_kernel([slow, quick], LAYER) is quick
    runs = quick.runs
    timed_choice.timed.cache_clear()  # as in another process
    assert choose_kernel([slow, quick], LAYER) is quick and quick.runs == runs
    (path,) = kept_files(tmp_path)
    kept = json.loads(path.read_text())
    assert kept["tokens"] == list(TOKENS) and kept["seconds"]["native"] == pytest.approx([1e-3] * 3)

    quick.milliseconds = dict.fromkeys(quick.milliseconds, 3)
    path.write_text("{}")
    timed_choice.timed.cache_clear()
    assert choose_kernel([slow, quick], LAYER) is slow and len(kept_files(tmp_path)) == 1
    timed_choice.timed.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert choose_kernel([slow, quick], LAYER) is slow and len(kept_files(tmp_path)) == 2


def test_nothing_is_timed_without_a_choice(clock: Clock, tmp_path: Path) -> None:
    only = Kernel("reference", clock, (1, 1, 1))
    assert choose_kernel([only], LAYER) is only and only.runs == 0 and not kept_files(tmp_path)


def test_a_cache_that_cannot_be_written(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(timed_choice.envs, "VLLM_CACHE_ROOT", str(tmp_path / "file"))
    slow, quick = Kernel("compiled", clock, (2, 2, 2)), Kernel("native", clock, (1, 1, 1))
    assert choose_kernel([slow, quick], LAYER) is quick


def test_ranks_follow_the_first(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they would find themselves, and without timing."""
    second = SimpleNamespace(rank_in_group=1, broadcast_object=lambda name, src: "compiled")
    monkeypatch.setattr(timed_choice, "get_tp_group", lambda: second)
    slow, quick = Kernel("compiled", clock, (2, 2, 2)), Kernel("native", clock, (1, 1, 1))
    assert choose_kernel([slow, quick], LAYER) is slow and slow.runs == quick.runs == 0


def test_without_the_engines_op_the_fastest_is_taken() -> None:
    assert fastest({"compiled": [2.0, 2.0], "other": [1.0, 3.0]}) == "other"


def test_experts_that_are_timed() -> None:
    """They stand for all: quantiles of the widths, and as many rows for each."""
    kept = list(range(0, 768, 6)) * 48
    layer = TimedLayer.of(kept, 128, 8, 2048, torch.bfloat16)
    assert 16 <= len(layer.widths) < 128 and sum(layer.widths) / len(layer.widths) == pytest.approx(381, abs=12)
    assert layer.num_tokens(1) == 1 and layer.num_tokens(512) == round(512 * len(layer.widths) / 128)
    rank = TimedLayer.of(kept, 128, 8, 2048, torch.bfloat16, num_local_experts=16)
    assert len(rank.widths) == 16 and rank.is_shared_out and not layer.is_shared_out
    assert rank.num_tokens(512) == 64, "each expert gets as many rows as it would of the whole layer"
    few = TimedLayer.of([0, 0, 0, 0], 4, 8, 64, torch.float32)
    assert few.top_k == 4 and few.widths == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [[16, 32, 48, 64] * 4, [32] * 16, [0] * 15 + [64], [0] * 16])
def test_every_candidate_of_this_machine_is_timed(dtype: torch.dtype, kept: list[int]) -> None:
    """Also while vLLM builds a model, when new tensors are of the model's dtype."""
    current_platform.import_kernels()
    register_op()
    kernels = candidates(dtype, 64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        seconds = time_kernels(TimedLayer.of(kept, 8, 2, 64, dtype), kernels)
    finally:
        torch.set_default_dtype(before)
    assert list(seconds) == [kernel.name for kernel in kernels]
    assert all(len(each) == len(TOKENS) and min(each) > 0 for each in seconds.values())
