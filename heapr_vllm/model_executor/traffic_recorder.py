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

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.atomic import check_writable
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.traffic import LayerTraffic, save_traffic
from heapr_vllm.model_executor.pruned_layer import PrunedLayer
from heapr_vllm.model_executor.storage.dense import DenseStorage

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
        self.layers: dict[str, tuple[PrunedLayer, DenseStorage]] = {}
        self.written = 0
        self.lock = threading.Lock()
        threading.Thread(target=self._write_now_and_then, daemon=True, name="heapr-traffic").start()
        Finalize(self, self.write, exitpriority=BEFORE_OTHERS)
        logger.info("recording traffic in %s, while serving and at the end", path)

    def add(self, name: str, layer: PrunedLayer, storage: DenseStorage) -> None:
        """Registers the layer's sums, `name` being what its masks call it; those of a layer loaded again go on."""
        if name in self.layers:
            return
        slots, width = storage.layout.num_slots, storage.layout.max_width
        device = layer.w13_weight.device
        energy = torch.zeros(slots, width, dtype=torch.float64, device=device)
        layer.register_buffer("heapr_activation_sq", energy, persistent=False)
        tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        layer.register_buffer("heapr_tokens", tokens, persistent=False)
        self.layers[name] = layer, storage

    def write(self) -> None:
        """Writes all sums if a token came since the last time; a failure is logged, for the engine shall go on."""
        with self.lock:
            layers = {name: _sums(layer, storage) for name, (layer, storage) in list(self.layers.items())}
            count = sum(int(layer.tokens.sum()) for layer in layers.values())
            if count == self.written:
                return
            try:
                save_traffic(self.path, layers, self.header)
                self.written = count
            except OSError as error:
                logger.warning("traffic is not written: %s", first_line(error))

    def _write_now_and_then(self) -> None:
        pause = SHORTEST_PAUSE_S
        while True:
            time.sleep(pause)
            begin = time.monotonic()
            self.write()
            pause = max(SHORTEST_PAUSE_S, PAUSES_PER_WRITE * (time.monotonic() - begin))


def traffic_folder() -> Path | None:
    """Returns where traffic is to be recorded; None if it is not. Raises HeaprError if nothing can be written there."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise HeaprError(f"{VARIABLE}={name} is a file; name a folder, or unset it")
    check_writable(folder / "traffic")
    return folder


def recorder(folder: Path, model: str, masks: NeuronMasks, base_fingerprint: str | None) -> TrafficRecorder:
    """Returns this process's recorder of a model.

    Raises HeaprError if the masks prune anything, so that sums would lack neurons, or where calls are replayed from
    CUDA graphs, in which padding cannot be told from tokens.
    """
    if not all(bool(keep.all()) for keep in masks.keep.values()):
        raise HeaprError(
            f"{VARIABLE} records the unpruned model; serve masks that keep everything (`heapr masks full MASKS -o "
            f"FULL`), or unset it"
        )
    config = get_current_vllm_config()
    graphs = config.compilation_config.cudagraph_mode
    if current_platform.is_cuda_alike() and graphs != CUDAGraphMode.NONE:
        raise HeaprError(f"{VARIABLE} cannot record what runs in CUDA graphs; add --enforce-eager, or unset it")
    return _recorder(folder, config.instance_id, get_world_group().rank, model, base_fingerprint)


@cache
def _recorder(folder: Path, run: str, rank: int, model: str, base_fingerprint: str | None) -> TrafficRecorder:
    header = {"run": run, "rank": rank, "model": model, "base_fingerprint": base_fingerprint}
    return TrafficRecorder(folder / f"{run}-rank{rank}.safetensors", header)


def _sums(layer: PrunedLayer, storage: DenseStorage) -> LayerTraffic:
    """Puts the sums by slot and stored neuron where experts and neurons of the model are."""
    keep = storage.masks.keep  # all of it
    energy, tokens = torch.zeros(keep.shape), torch.zeros(len(keep), dtype=torch.int64)
    found, counts = layer.heapr_activation_sq.cpu(), layer.heapr_tokens.cpu()
    for expert, local in storage.local_ids.items():
        slot = storage.layout.slots[local]
        if slot == storage.layout.num_slots:
            continue
        start, stop = storage.shares[local]
        energy[expert, start:stop] = found[slot, : stop - start].float()
        tokens[expert] = counts[slot]
    return LayerTraffic(energy, tokens)
