# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: written beside their place, then renamed into it."""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from heapr_vllm.errors import HeaprError

CALIBRATION, MASKS, CHECKPOINT = "calibration", "masks repository", "exported checkpoint"  # kinds of folders we write
_MASKS_FILE, _WEIGHTS = "heapr/masks.safetensors", ("model.safetensors", "model.safetensors.index.json")
_MOMENTS = ("moments.safetensors", "partial.safetensors", "calibration.json")

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<state>partial|replaced)\.(?P<process>\d+)")


def kind_of(path: Path) -> str | None:
    """Tells which kind of folder of ours `path` is; None if it is none."""
    if (path / _MASKS_FILE).exists():
        return CHECKPOINT if any((path / name).exists() for name in _WEIGHTS) else MASKS
    return CALIBRATION if any((path / name).exists() for name in _MOMENTS) else None


def check_output(path: Path, kind: str, *, overwrite: bool, inputs: Iterable[Path] = (), hint: str = "") -> None:
    """Raises HeaprError if `path` may not become a folder of this kind, or nothing can be written there.

    It must not be, hold or lie in one of the `inputs`, and may only replace a folder of its own kind. `hint`: another
    way, for the message that it exists.
    """
    place = _real(path)
    for name in inputs:
        other = _real(name)
        if place == other or place in other.parents or other in place.parents:
            raise HeaprError(f"{path} is, holds or lies in {name}, which is an input; choose another --output")
    check_writable(place)
    if not path.exists() or (path.is_dir() and all(_TEMPORARY.fullmatch(entry.name) for entry in path.iterdir())):
        return
    if not overwrite:
        raise HeaprError(f"{path} already exists; pass --overwrite to replace it{hint}, or choose another --output")
    found = kind_of(path) if path.is_dir() else None
    if found is None:
        raise HeaprError(f"{path} was not written by heapr, so --overwrite does not touch it; choose another --output")
    if found != kind:
        raise HeaprError(f"{path} is a {found}, which a {kind} does not replace; choose another --output, or remove it")


def check_writable(path: Path) -> None:
    """Raises HeaprError if nothing can be written beside `path`, before work of hours is done for it."""
    folder = next(parent for parent in _real(path).parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise HeaprError(f"{folder} cannot be written to; choose another --output, or change its permissions")


def check_file(path: Path) -> None:
    """Raises HeaprError if no file can become `path`."""
    if path.is_dir():
        raise HeaprError(f"{path} is a directory; name a file with --output")
    check_writable(path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def atomic_directory(path: Path, kind: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Generator[Path]:
    """Yields an empty folder that becomes `path` when the block ends well and vanishes when it does not.

    If `path` is a symbolic link, what it points to is replaced. Raises HeaprError as `check_output`.
    """
    if _real(path).parent.is_dir():
        remove_leftovers(_real(path))
    check_output(path, kind, overwrite=overwrite, inputs=inputs)
    path = _real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial.{os.getpid()}"
    replaced = path.parent / f".{path.name}.replaced.{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _open_to_readers(file)
        check_output(path, kind, overwrite=overwrite)  # another command may have written it meanwhile
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Makes `folder`, for work that fills it bit by bit, and keeps other commands out; if it stays empty it goes again.

    Raises HeaprError if another command is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeaprError(
                f"another command is writing {folder}; wait until it has ended, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system that has no locks
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(descriptor)


def atomic_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary name, flushes it to disk and renames it to `path`, whose folder it makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    folder = path.with_name(f".{path.name}.partial.{os.getpid()}")  # safetensors puts a temporary of its own beside it
    folder.mkdir()
    try:
        partial = folder / path.name
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        _open_to_readers(partial)
        partial.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_to_readers(file: Path) -> None:
    """Gives a file the mode that the user's umask wants: safetensors creates files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def remove_leftovers(path: Path) -> None:
    """Removes temporaries of `path` whose process was killed; what was about to be replaced comes back."""
    for entry in path.parent.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if not match or match["name"] != path.name or _is_other_process(int(match["process"])):
            continue
        if match["state"] == "replaced" and not path.exists():
            entry.rename(path)
        else:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_other_process(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
