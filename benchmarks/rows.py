# SPDX-License-Identifier: Apache-2.0
"""CSV rows of measurements, each with date, hardware, versions and the command that gave it."""

import csv
import datetime
import platform
import sys
from pathlib import Path

from heapr_vllm.environment import report

PACKAGES = ("heapr-vllm", "vllm", "flashinfer-python", "torch", "triton")


def append_csv(path: Path, rows: list[dict]) -> None:
    """Adds `rows` to `path`, which gets a header if it is new. Raises ValueError if its columns are others."""
    environment = report()
    versions = environment["versions"]
    shared = {
        "date": datetime.date.today().isoformat(),
        "device": ", ".join(environment["gpus"])
        or f"CPU {platform.processor() or platform.machine()} {environment['cpu']['capability']}, "
        f"{environment['cpu']['threads']} threads",
        "versions": " ".join(f"{name}={versions[name]}" for name in PACKAGES if name in versions),
        "command": f"python -m {_module()} {' '.join(sys.argv[1:])}".strip(),
    }
    fields = [*rows[0], *shared]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (header := path.open().readline().strip()) != ",".join(fields):
        raise ValueError(f"{path} has other columns ({header}); choose another --csv")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
