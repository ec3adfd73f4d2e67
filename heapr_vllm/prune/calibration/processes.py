# SPDX-License-Identifier: Apache-2.0
"""Calibration over several processes (`torchrun`): each takes a share of the samples, the sums are added at the end."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.prune.calibration.moments import MAXIMA, NeuronMoments
from heapr_vllm.prune.text.samples import Samples

MEETING = timedelta(minutes=2)  # until all have come
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
    def hides_progress(self) -> bool:
        """For tqdm's `disable`: only the first process has a bar."""
        return not self.is_first

    def device(self, device: str) -> str:
        """Names the device of this process: its own GPU where `device` is "cuda". Raises HeaprError for "auto"."""
        if self.size > 1 and device == "auto":
            raise HeaprError("--device auto spreads one model over all GPUs; with torchrun use --device cuda")
        return f"cuda:{self.local_rank}" if self.size > 1 and device == "cuda" else device

    def share(self, samples: Samples) -> Samples:
        """Takes this process's part of the samples. Raises HeaprError if there are fewer than processes."""
        if len(samples) < self.size:
            raise HeaprError(f"{self.size} processes cannot share {len(samples)} samples; start {len(samples)}")
        return Samples(samples.entries[self.rank :: self.size], samples.sources)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Raises HeaprError in every process if one has another `identity`: settings, text, weights."""
        first, *others = self._gathered(identity)
        for rank, other in enumerate(others, 1):
            changed = sorted(name for name, value in first.items() if other[name] != value)
            if changed:
                raise HeaprError(
                    f"process {rank} has another {', '.join(changed)} than process 0; start all with the same command, "
                    "and give every node the same model and text"
                )

    def check_shared(self, folder: Path) -> None:
        """Raises HeaprError in every process if one does not see what the first writes into `folder`."""
        if self.size == 1:
            return
        probe = folder / f".seen.partial.{os.getpid()}"  # named as what a killed command leaves
        if self.is_first:
            probe.touch()
        name, *_ = self._gathered(probe.name)
        seen = self._gathered((folder / name).exists())
        probe.unlink(missing_ok=True)
        if not all(seen):
            blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
            raise HeaprError(
                f"process {blind} does not see {folder.absolute()} of process 0; choose an --output on a file system "
                "that all nodes share"
            )

    def _gathered(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, moments: NeuronMoments) -> NeuronMoments:
        """Adds up the moments of all processes, the same in each."""
        if self.size == 1:
            return moments
        for layers in moments.sources.values():
            for _, layer in sorted(layers.items()):
                for name, values in layer.tensors().items():
                    dist.all_reduce(values, dist.ReduceOp.MAX if name in MAXIMA else dist.ReduceOp.SUM)
        return NeuronMoments.of_sources(moments.sources, moments.metadata)


ALONE = Processes()


@contextmanager
def joined_processes() -> Generator[Processes]:
    """Connects the processes that `torchrun` started; only this one without it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    processes, port = _torchruns()
    opens = processes.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun did already
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, processes.size, opens, timeout=MEETING)
        # the sums are on the CPU
        dist.init_process_group("gloo", store=store, rank=processes.rank, world_size=processes.size, timeout=PATIENCE)
    except (dist.DistError, RuntimeError) as error:
        raise HeaprError(
            f"{processes.size} processes did not meet at {os.environ['MASTER_ADDR']}:{port} ({first_line(error)}); "
            "start all of them with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def _torchruns() -> tuple[Processes, int]:
    """This process and the port to meet at, as `torchrun` says. Raises HeaprError if its variables make no sense."""
    numbers = {}
    if "MASTER_ADDR" not in os.environ:
        raise HeaprError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, and MASTER_ADDR is unset; start them "
            "with torchrun, or unset WORLD_SIZE"
        )
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value.isdecimal():
            raise HeaprError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, and {name} is {value!r}; start "
                "them with torchrun, or unset WORLD_SIZE"
            )
        numbers[name] = int(value)
    if not numbers["RANK"] < numbers["WORLD_SIZE"] or numbers["MASTER_PORT"] > 65535:
        raise HeaprError(
            f"RANK {numbers['RANK']} is not below WORLD_SIZE {numbers['WORLD_SIZE']}, or MASTER_PORT "
            f"{numbers['MASTER_PORT']} is none; start with torchrun"
        )
    here = Processes(rank=numbers["RANK"], size=numbers["WORLD_SIZE"], local_rank=numbers["LOCAL_RANK"])
    return here, numbers["MASTER_PORT"]
