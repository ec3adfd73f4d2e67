# SPDX-License-Identifier: Apache-2.0
"""Calibration over several processes (`torchrun`): each takes a share of the samples, the sums are added at the end."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.moments import NORMS, NeuronMoments

MAXIMA = ("peak_norm", *NORMS)  # norms of weights are the same in every process
PATIENCE = timedelta(days=7)  # for the slowest process: they meet only at the start and at the end


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all that calibrate together; they share a file system."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    @property
    def hides_progress(self) -> bool | None:
        """For tqdm's `disable`: only the first process has a bar, and only on a terminal."""
        return None if self.is_first else True

    def device(self, device: str) -> str:
        """Names the device of this process: its own GPU where `device` is "cuda". Raises HeaprError for "auto"."""
        if self.size > 1 and device == "auto":
            raise HeaprError("--device auto spreads one model over all GPUs; with torchrun use --device cuda")
        return f"cuda:{self.local_rank}" if self.size > 1 and device == "cuda" else device

    def share(self, samples: torch.Tensor) -> torch.Tensor:
        """Takes this process's part of `samples` int64 [N, L]. Raises HeaprError if there are fewer than processes."""
        if len(samples) < self.size:
            raise HeaprError(f"{self.size} processes cannot share {len(samples)} samples; start {len(samples)}")
        return samples[self.rank :: self.size]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def total(self, moments: NeuronMoments) -> NeuronMoments:
        """Adds up the moments of all processes, in place and the same in each."""
        if self.size > 1:
            for _, layer in sorted(moments.layers.items()):
                for name, values in layer.tensors().items():
                    dist.all_reduce(values, dist.ReduceOp.MAX if name in MAXIMA else dist.ReduceOp.SUM)
        return moments


ALONE = Processes()


@contextmanager
def joined_processes() -> Generator[Processes]:
    """Connects the processes that `torchrun` started; only this one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=PATIENCE)  # the sums are on the CPU
    try:
        yield Processes(rank=dist.get_rank(), size=size, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
