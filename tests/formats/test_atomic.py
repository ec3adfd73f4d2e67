# SPDX-License-Identifier: Apache-2.0
"""Temporaries of killed processes go; those of living ones, and everybody else's files, stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import (
    CALIBRATION,
    CHECKPOINT,
    MASKS,
    alone_in,
    atomic_directory,
    atomic_file,
    check_output,
)


@pytest.fixture(scope="module")
def ended() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_a_directory(ended: int, tmp_path: Path) -> None:
    gone = [tmp_path / name for name in (f".out.partial.{ended}", f".out.partial.{os.getpid()}")]
    kept = [tmp_path / name for name in (f".out.partial.{os.getppid()}", f".other.partial.{ended}", ".out.backup.1")]
    for path in (*gone, *kept):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    with atomic_directory(tmp_path / "out", MASKS) as folder:
        (folder / "config.json").write_text("{}")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *kept])


def test_leftovers_of_a_file(ended: int, tmp_path: Path) -> None:
    (tmp_path / f".a.json.partial.{ended}").mkdir()
    (tmp_path / f".a.json.partial.{ended}" / "a.json").write_text("half")
    check_output(tmp_path, MASKS, overwrite=False)  # nothing else is there: the folder counts as empty
    atomic_file(tmp_path / "a.json", lambda path: path.write_text("whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(HeaprError, match="already exists"):
        check_output(tmp_path, MASKS, overwrite=False)


def folder_of(kind: str, path: Path) -> Path:
    """A folder of ours with the files that tell its kind."""
    files = {
        CALIBRATION: ["moments.safetensors"],
        MASKS: ["heapr/masks.safetensors"],
        CHECKPOINT: ["heapr/masks.safetensors", "model.safetensors.index.json"],
    }
    for name in files[kind]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    return path


def test_a_folder_is_replaced_by_its_own_kind_only(tmp_path: Path) -> None:
    for kind in (CALIBRATION, MASKS, CHECKPOINT):
        folder = folder_of(kind, tmp_path / kind)
        check_output(folder, kind, overwrite=True)
        for other in {CALIBRATION, MASKS, CHECKPOINT} - {kind}:
            with pytest.raises(HeaprError, match=f"is a {kind}, which a {other} does not replace"):
                check_output(folder, other, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(HeaprError, match="was not written by heapr"):
        check_output(tmp_path / "notes", MASKS, overwrite=True)
    with pytest.raises(HeaprError, match="pass --overwrite to replace it, --resume to continue it, or choose"):
        check_output(tmp_path / CALIBRATION, CALIBRATION, overwrite=False, hint=", --resume to continue it")


def test_inputs_are_never_written_to(tmp_path: Path) -> None:
    """Itself, above it, below it, and all of that by another name."""
    source = folder_of(MASKS, tmp_path / "a" / "masks")
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "a", source / "sub" / "out", tmp_path / "link", tmp_path / "link" / "out"):
        with pytest.raises(HeaprError, match="which is an input; choose another --output"):
            check_output(output, MASKS, overwrite=True, inputs=[source])
    check_output(tmp_path / "a" / "masks2", MASKS, overwrite=False, inputs=[source])


def test_a_link_is_written_through_and_files_are_readable(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "place")
    for text in ("1", "2"):
        with atomic_directory(tmp_path / "link", CALIBRATION, overwrite=True) as folder:
            (folder / "moments.safetensors").write_text(text)
            (folder / "moments.safetensors").chmod(0o600)
    written = tmp_path / "place" / "moments.safetensors"
    assert (tmp_path / "link").is_symlink() and written.read_text() == "2"
    mask = os.umask(0)
    os.umask(mask)
    assert written.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_was_about_to_be_replaced_comes_back(ended: int, tmp_path: Path) -> None:
    """A command was killed between the two renames: the old folder is there again, and counts."""
    folder_of(MASKS, tmp_path / f".out.replaced.{ended}")
    with (
        pytest.raises(HeaprError, match="already exists"),
        atomic_directory(tmp_path / "out", MASKS),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SystemExit), atomic_directory(tmp_path / "out", MASKS, overwrite=True):
        raise SystemExit(143)
    assert (tmp_path / "out" / "heapr" / "masks.safetensors").is_file()


def test_of_two_commands_one_wins(tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match="already exists"), atomic_directory(tmp_path / "out", MASKS):
        folder_of(MASKS, tmp_path / "out")  # the other one, which was faster
    assert (tmp_path / "out" / "heapr" / "masks.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_command_works_in_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a" / "out"):
        with pytest.raises(HeaprError, match="another command is writing"), alone_in(tmp_path / "a" / "out"):
            pass
        (tmp_path / "a" / "out" / "x").write_text("")
    with pytest.raises(KeyError), alone_in(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out" / "x").unlink()
        raise KeyError
    assert not (tmp_path / "a" / "out").exists()
