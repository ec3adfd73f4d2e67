# SPDX-License-Identifier: Apache-2.0
"""Memory and matrix instructions in PTX, counted. Widths are bytes per thread."""

import re
from collections import Counter

GLOBAL = r"\b{opcode}\.(?:[\w:]+\.)*?global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s"  # vector length, bits
ASYNC = r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)"


def loads(ptx: str) -> Counter[int]:
    """Global loads into registers by width."""
    return _accesses("ld", ptx)


def stores(ptx: str) -> Counter[int]:
    """Global stores from registers by width."""
    return _accesses("st", ptx)


def async_copies(ptx: str) -> Counter[int]:
    """Asynchronous copies from global to shared memory by width, TMA not included."""
    return Counter(int(size, 0) for size in re.findall(ASYNC, ptx))


def tma_copies(ptx: str) -> int:
    """Copies of whole tiles by the Tensor Memory Accelerator, in either direction."""
    return len(re.findall(r"\bcp\.async\.bulk\.tensor\.", ptx))


def wgmmas(ptx: str) -> int:
    """Matrix instructions of a warp group."""
    return len(re.findall(r"\bwgmma\.mma_async\.", ptx))


def narrow(accesses: Counter[int]) -> int:
    """Accesses of 2 bytes or less: those of single bf16 numbers. Indices take 4 or 8."""
    return sum(count for width, count in accesses.items() if width <= 2)


def describe(accesses: Counter[int]) -> str:
    """For a table: "4 x 2 B, 8 x 16 B"."""
    return ", ".join(f"{count} x {width} B" for width, count in sorted(accesses.items()))


def _accesses(opcode: str, ptx: str) -> Counter[int]:
    found = re.findall(GLOBAL.format(opcode=opcode), ptx)
    return Counter(int(length or 1) * int(bits) // 8 for length, bits in found)
