# SPDX-License-Identifier: Apache-2.0
"""Temporaries of killed processes go; those of living ones, and everybody else's files, stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_directory, atomic_file, check_output


@pytest.fixture(scope="module")
def ended() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_a_directory(ended: int, tmp_path: Path) -> None:
    gone = [
        tmp_path / name for name in (f".out.partial.{ended}", f".out.replaced.{ended}", f".out.partial.{os.getpid()}")
    ]
    kept = [tmp_path / name for name in (f".out.partial.{os.getppid()}", f".other.partial.{ended}", ".out.backup.1")]
    for path in (*gone, *kept):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *kept])


def test_leftovers_of_a_file(ended: int, tmp_path: Path) -> None:
    (tmp_path / f".a.json.partial.{ended}").mkdir()
    (tmp_path / f".a.json.partial.{ended}" / "a.json").write_text("half")
    check_output(tmp_path, overwrite=False)  # nothing else is there: the folder counts as empty
    atomic_file(tmp_path / "a.json", lambda path: path.write_text("whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(HeaprError, match="already exists"):
        check_output(tmp_path, overwrite=False)
