# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled op `heapr::cpu_ragged_moe`: from the wheel, or from vLLM's cache, compiled there on first use."""

from __future__ import annotations

import fcntl
import time
from functools import cache
from pathlib import Path

import torch
import vllm.envs as envs
from vllm.logger import init_logger

from heapr_vllm.errors import first_line
from heapr_vllm.model_executor.kernels.cpu_compiled import build

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only


@cache
def load() -> bool:
    """Registers the op, compiling it first if that never happened here.

    False, with the reason logged, if that is impossible.
    """
    try:
        if not _load_shipped():
            _load_or_compile(Path(envs.VLLM_CACHE_ROOT) / "heapr")
    except (OSError, RuntimeError, ImportError) as error:
        logger.info("experts of variable width run in buckets, their kernel cannot be compiled: %s", first_line(error))
        return False
    torch.library.register_fake("heapr::cpu_ragged_moe", _fake)
    return True


def _load_shipped() -> bool:
    """Whether this package holds a library for this machine, and it loads."""
    library = build.SOURCE.with_name(build.library_name())
    if not library.exists():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        logger.info("the CPU kernel of this wheel does not load here: %s", first_line(error))
        return False
    return True


def _load_or_compile(folder: Path) -> None:
    """One process compiles while others wait; a dead one's lock is free. Raises what `build.build` raises."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / build.library_name()
        if library.exists():
            torch.ops.load_library(str(library))
            return
        logger.info("compiling the CPU kernel for experts of variable width, once on this machine (about 15 s) ...")
        start = time.perf_counter()
        build.build(folder)
        logger.info("compiled in %.0f s: %s", time.perf_counter() - start, library)


def _fake(*arguments: object) -> None:
    """Shapes only: the op writes in place and returns nothing."""
