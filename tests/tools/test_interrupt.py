# SPDX-License-Identifier: Apache-2.0
"""Commands stopped at random moments, and on disks that are full: a few here, all of them with the tools themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.full_disk import CANNOT_MOUNT

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> tuple[int, list[list[str]], str]:
    """Exit code, cells of the rows of the table, and all output of a tool."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.returncode, lines[1:], done.stdout + done.stderr


def test_a_few_moments() -> None:
    status, rows, output = run("tools.interrupt", "--moments", "4", "--startups", "1", "--command", "prune", "export")
    assert status == 0, output
    assert {row[0] for row in rows} >= {"prune", "prune --overwrite", "export", "export --overwrite"}
    assert all(row[-1] == "0" for row in rows)
    states = [sum(int(row[column]) for row in rows if row[2] == "SIGINT, SIGTERM") for column in (4, 5, 6)]
    assert sum(states) == 4 * 7 and min(states[:2]) > 0, "stopped before and while they wrote"


@pytest.mark.slow
def test_moments_of_commands_that_write_folders() -> None:
    """And pictures; `eval` and `tune` take long, with the tool itself."""
    commands = ("calibrate", "prune", "sweep", "inspect", "export")
    status, rows, output = run("tools.interrupt", "--moments", "10", "--startups", "1", "--command", *commands)
    assert status == 0, output
    assert len({row[0] for row in rows}) == 12


def test_full_disks_and_read_only_folders() -> None:
    status, rows, output = run("tools.full_disk", "--command", "prune", "export", "eval", "sweep", "inspect")
    if status == CANNOT_MOUNT:
        pytest.skip("no file system can be mounted here: neither root nor user namespaces")
    assert status == 0, output
    assert len(rows) == 10 and all(row[2] == row[-1] == "refused" for row in rows)


@pytest.mark.slow
def test_full_disks_of_calibrations_and_tuning() -> None:
    status, rows, output = run("tools.full_disk", "--command", "calibrate", "tune")
    if status == CANNOT_MOUNT:
        pytest.skip("no file system can be mounted here: neither root nor user namespaces")
    assert status == 0, output
    assert len(rows) == 4
