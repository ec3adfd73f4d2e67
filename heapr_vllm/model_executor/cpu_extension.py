# SPDX-License-Identifier: Apache-2.0
"""The compiled op `heapr::cpu_ragged_moe`: built on first use, afterwards loaded from vLLM's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
import vllm.envs as envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers below its own name only

SOURCE = Path(__file__).parent / "csrc" / "cpu_ragged_moe.cpp"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ISA_FLAGS = {"default": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}


def isa() -> str:
    """Instruction set to compile for: the one PyTorch uses here, which ATEN_CPU_CAPABILITY can lower."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return capability if capability in ISA_FLAGS else "default"


@cache
def load() -> bool:
    """Registers the op, compiling it first if that never happened here; False, with the reason logged, if impossible.

    HEAPR_CPU_CFLAGS adds compiler flags.
    """
    capability = isa().removesuffix("_bf16").upper()
    flags = ["-O3", "-fopenmp", "-fno-math-errno", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}",
             *ISA_FLAGS[isa()], *os.environ.get("HEAPR_CPU_CFLAGS", "").split()]
    key = hashlib.sha256("\n".join((SOURCE.read_text(), torch.__version__, *flags)).encode()).hexdigest()[:16]
    try:
        _load_or_compile(Path(envs.VLLM_CACHE_ROOT) / "heapr" / f"cpu_ragged_moe-{isa()}-{key}.so", flags)
    except (OSError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.info("experts of variable width run in buckets, their kernel cannot be compiled: %s", reason)
        return False
    torch.library.register_fake("heapr::cpu_ragged_moe", _fake)
    return True


def _load_or_compile(library: Path, flags: list[str]) -> None:
    """Loads `library`, written whole or not at all. One process compiles while others wait; a dead one's lock is free.

    Raises OSError if the folder cannot be written, RuntimeError or ImportError without a compiler or Ninja.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            torch.ops.load_library(str(library))
            return
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            raise FileNotFoundError(f"no C++ compiler, {compiler} is not on the PATH")
        logger.info("compiling the CPU kernel for experts of variable width, once on this machine (about 10 s) ...")
        from torch.utils import cpp_extension  # imports setuptools

        start = time.perf_counter()
        built = cpp_extension.load("heapr_cpu_ragged_moe", [str(SOURCE)], extra_cflags=flags, extra_ldflags=flags,
                                   build_directory=folder, is_python_module=False)
        os.replace(built, library)
        logger.info("compiled in %.0f s: %s", time.perf_counter() - start, library)


def _fake(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
          topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, table: torch.Tensor) -> None:
    """Shapes only: the op writes in place and returns nothing."""
