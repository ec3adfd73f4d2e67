# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: written beside their place, then renamed into it."""

import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from heapr_vllm.errors import HeaprError

OWN_FILES = ("heapr/masks.safetensors", "moments.safetensors", "partial.safetensors")

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(partial|replaced)\.(?P<process>\d+)")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises HeaprError if `path` exists and may not be replaced."""
    if not path.exists() or (path.is_dir() and all(_TEMPORARY.fullmatch(entry.name) for entry in path.iterdir())):
        return
    if not overwrite:
        raise HeaprError(f"{path} already exists; pass --overwrite to replace it, or choose another --output")
    if not path.is_dir() or not any((path / name).exists() for name in OWN_FILES):
        raise HeaprError(f"{path} was not written by heapr, so --overwrite does not touch it; choose another --output")


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Yields an empty folder that becomes `path` when the block ends well and vanishes when it does not.

    Raises HeaprError if `path` exists and `overwrite` is false, or if it is not a folder heapr wrote.
    """
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.parent / f".{path.name}.partial.{os.getpid()}"
    replaced = path.parent / f".{path.name}.replaced.{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def atomic_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary name, flushes it to disk and renames it to `path`."""
    _remove_leftovers(path)
    folder = path.with_name(f".{path.name}.partial.{os.getpid()}")  # safetensors puts a temporary of its own beside it
    folder.mkdir()
    try:
        partial = folder / path.name
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Removes temporaries of `path` whose process was killed."""
    for entry in path.parent.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and match["name"] == path.name and not _is_other_process(int(match["process"])):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_other_process(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
