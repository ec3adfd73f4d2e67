# SPDX-License-Identifier: Apache-2.0
"""The table of what every Triton of the supported window makes of the kernels, kept in compile_table.csv.

python -m tools.compile_table   # writes it; the diff shows what a change of the kernels did
"""

import csv
import io
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from heapr_vllm.formats.atomic import atomic_file
from tests.model_executor.engine import ROOT
from tools import triton_window

ARCHES = ("sm_90a", "sm_80")
TABLE = Path(__file__).with_suffix(".csv")


def compiled() -> list[dict[str, str]]:
    """One row per Triton, architecture and variant of a kernel, compiled now. Minutes on two cores."""
    jobs = itertools.product(triton_window.versions(), ARCHES)
    with ThreadPoolExecutor(2) as pool:
        return list(itertools.chain.from_iterable(pool.map(lambda job: _compile(*job), jobs)))


def committed() -> list[dict[str, str]]:
    """The rows of the table in this checkout."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _compile(version: str, arch: str) -> list[dict[str, str]]:
    """Rows of one Triton and architecture, from a process of its own: here kernels may be interpreted."""
    process = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", arch],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=triton_window.environment(version),
    )
    if process.returncode:
        raise RuntimeError(f"Triton {version}, {arch}: {process.stderr[-4000:]}")
    return list(csv.DictReader(io.StringIO(process.stdout)))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    rows = compiled()
    atomic_file(TABLE, lambda path: _write(path, rows))
    print(f"{TABLE.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
