# SPDX-License-Identifier: Apache-2.0
"""Writes what the kernels add up of an engine's traffic to a folder, while it serves: HEAPR_TRAFFIC names it."""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.traffic import LayerTraffic, save_traffic
from heapr_vllm.model_executor.storage.dense import DenseStorage
from heapr_vllm.model_executor.storage.traffic_sums import RECORDED, TrafficSums

VARIABLE = "HEAPR_TRAFFIC"
SHORTEST_PAUSE_S = 1.0
PAUSES_PER_WRITE = 50  # a pause is as many times as long as the last write took, which is 2% of the time then
BEFORE_OTHERS = 100  # exit priority: before vLLM takes its own things down

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


class TrafficRecorder:
    """One process's layers, and the thread that writes their sums whenever they have grown, and at exit."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.layers: dict[str, DenseStorage] = {}
        self.written = 0
        self.lock = threading.Lock()
        threading.Thread(target=self._write_now_and_then, daemon=True, name="heapr-traffic").start()
        Finalize(self, self.write, exitpriority=BEFORE_OTHERS)
        logger.info("recording traffic in %s, while serving and at the end", path)

    def add(self, storage: DenseStorage, top_k: int, device: torch.device) -> None:
        """Makes the sums of a layer that was loaded; those of one that is loaded again go on."""
        self.header["top_k"] = top_k
        name = storage.masks.name
        if name in self.layers:
            return
        slots, width = storage.layout.num_slots, storage.layout.max_width
        energy = torch.zeros(slots, width, dtype=torch.float64, device=device)
        RECORDED[name] = TrafficSums(energy, torch.zeros(slots, dtype=torch.int64, device=device))
        self.layers[name] = storage

    def write(self) -> None:
        """Writes all sums if a token came since the last time; a failure is logged, for the engine shall go on."""
        with self.lock:
            stored = dict(self.layers)
            count = sum(int(RECORDED[name].tokens.cpu().numpy().sum()) for name in stored)
            if count == self.written:
                return
            layers = {name: _by_expert(RECORDED[name], storage) for name, storage in stored.items()}
            try:
                save_traffic(self.path, layers, self.header)
                self.written = count
            except Exception as error:  # of a full disk safetensors makes one of its own
                logger.warning("traffic is not written: %s", first_line(error))

    def _write_now_and_then(self) -> None:
        pause = SHORTEST_PAUSE_S
        while True:
            time.sleep(pause)
            begin = time.monotonic()
            self.write()
            pause = max(SHORTEST_PAUSE_S, PAUSES_PER_WRITE * (time.monotonic() - begin))


def start_recorder(model: str, masks: NeuronMasks, base_fingerprint: str | None) -> TrafficRecorder | None:
    """Returns this process's recorder of a model; None if HEAPR_TRAFFIC is unset or empty.

    Raises HeaprError if nothing can be written there, or the sums would be wrong.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    if not all(bool(keep.all()) for keep in masks.keep.values()):
        raise HeaprError(
            f"{VARIABLE} records the unpruned model; serve masks that keep everything (`heapr masks full MASKS -o "
            f"FULL`), or unset it"
        )
    config = get_current_vllm_config()
    _refuse(config)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        is_open = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        is_open = False
    if not is_open:
        raise HeaprError(f"{VARIABLE}={folder} is no folder that can be written to; name another, or unset it")
    header = {
        "run": config.instance_id,
        "rank": get_world_group().rank,
        "ranks": config.parallel_config.world_size,
        "model": model,
        "base_fingerprint": base_fingerprint,
    }
    return _recorder(Path(folder, f"{header['run']}-rank{header['rank']}.safetensors"), tuple(header.items()))


@cache
def _recorder(path: Path, header: tuple[tuple[str, Any], ...]) -> TrafficRecorder:
    return TrafficRecorder(path, dict(header))


def _refuse(config: VllmConfig) -> None:
    """Raises HeaprError where padding cannot be told from tokens, or the sums' memory may go away."""
    if current_platform.is_cuda_alike() and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise HeaprError(f"{VARIABLE} cannot record what runs in CUDA graphs; add --enforce-eager, or unset it")
    if config.parallel_config.data_parallel_size > 1:
        raise HeaprError(
            f"{VARIABLE} cannot tell tokens from padding with data parallelism; drop --data-parallel-size, or unset it"
        )
    if config.model_config.enable_sleep_mode:
        raise HeaprError(f"{VARIABLE} does not go with sleep mode; drop --enable-sleep-mode, or unset it")


def _by_expert(sums: TrafficSums, storage: DenseStorage) -> LayerTraffic:
    """Puts the sums by slot and stored neuron where experts and neurons of the model are.

    In NumPy: torch would start threads of its own for the caller, which go on spinning on the engine's cores.
    """
    keep = storage.masks.keep  # all of it
    energy, tokens = np.zeros(keep.shape, np.float32), np.zeros(len(keep), np.int64)
    found, counts = sums.activation_sq.cpu().numpy(), sums.tokens.cpu().numpy()
    for expert, local in storage.local_ids.items():
        slot = storage.layout.slots[local]
        if slot == storage.layout.num_slots:
            continue
        start, stop = storage.shares[local]
        energy[expert, start:stop] = found[slot, : stop - start]
        tokens[expert] = counts[slot]
    return LayerTraffic(torch.from_numpy(energy), torch.from_numpy(tokens))
