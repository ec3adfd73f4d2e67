# SPDX-License-Identifier: Apache-2.0
"""Compiles `ragged_moe.cpp` for this machine. Needs no vLLM, so that a wheel can be built with the result."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "ragged_moe.cpp"
HEADERS = tuple(map(SOURCE.with_name, ("panels.h", "codes.h", "integers.h")))
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
ISA_FLAGS = {
    "default": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "avx512_amx": (*AVX512_BF16, "-DHEAPR_AMX"),
}


def isa() -> str:
    """Instruction set to compile for: the one PyTorch uses here, which ATEN_CPU_CAPABILITY can lower."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_amx" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
    return capability if capability in ISA_FLAGS else "default"


def has_vbmi() -> bool:
    """Whether tables of 128 bytes in registers may decode weights."""
    return isa().startswith("avx512") and _capabilities().get("avx512_vbmi", False)


def has_vnni() -> bool:
    """Whether one instruction may multiply activations and weights of 8 bits."""
    return isa().startswith("avx512") and _capabilities().get("avx512_vnni", False)


def _capabilities() -> dict[str, bool]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.11 has none


def flags() -> list[str]:
    """Compiler flags; HEAPR_CPU_CFLAGS adds to them."""
    capability = isa().split("_")[0].upper()
    return [
        "-O3",
        "-fopenmp",
        "-fno-math-errno",
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        *ISA_FLAGS[isa()],
        *(["-mavx512vbmi"] if has_vbmi() else []),
        *(["-mavx512vnni"] if has_vnni() else []),
        *os.environ.get("HEAPR_CPU_CFLAGS", "").split(),
    ]


def library_name() -> str:
    """File name that says what the library was built from: instruction set, and hash of sources, PyTorch and flags."""
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    key = hashlib.sha256("\n".join((*sources, torch.__version__, *flags())).encode()).hexdigest()[:16]
    return f"cpu_ragged_moe-{isa()}-{key}.so"


def build(folder: Path) -> Path:
    """Compiles into `folder`, whole or not at all, and loads what it compiled; about 15 s.

    Raises OSError if there is no compiler or the folder cannot be written, RuntimeError or ImportError if PyTorch's
    extension builder fails (Ninja or setuptools missing, say).
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler, {compiler} is not on the PATH")
    from torch.utils import cpp_extension  # imports setuptools

    folder.mkdir(parents=True, exist_ok=True)
    library = folder / library_name()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = cpp_extension.load(
            "heapr_cpu_ragged_moe",
            [str(SOURCE)],
            extra_cflags=flags(),
            extra_ldflags=flags(),
            build_directory=scratch,
            is_python_module=False,
        )
        os.replace(built, library)
    return library
