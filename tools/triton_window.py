# SPDX-License-Identifier: Apache-2.0
"""The Tritons that the vLLMs of the supported window bring: which ones, and an environment with each.

    python -m tools.triton_window   # prints them

A GPU build of vLLM pins torch, and torch pins Triton. The package index is asked once per window (a minute; where it
offers no metadata apart, pip downloads whole wheels); delete build/triton/window.json to ask again.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from heapr_vllm.environment import SUPPORTED_VLLM

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "triton"
ADVICE = (
    f"`pip` could not answer. The tests need a package index once: connect, or name one that you reach in "
    f"PIP_INDEX_URL, and run `{Path(sys.executable).name} -m tools.triton_window`"
)


class Release(NamedTuple):
    """A vLLM and what it brings."""

    vllm: str
    torch: str
    triton: str


def versions() -> list[str]:
    """Every Triton to compile with, oldest first: those of the window and the installed one."""
    return sorted({release.triton for release in releases()} | {installed_version("triton")}, key=Version)


def releases(window: str = SUPPORTED_VLLM, path: Path = FOLDER / "window.json") -> list[Release]:
    """The newest patch release of every vLLM minor in `window`, remembered in `path`."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if window not in known:
        known[window] = resolve(window)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    return [Release(*entry) for entry in known[window]]


def resolve(window: str) -> list[Release]:
    """The releases in `window`, from the package index."""
    engines = newest_patches(released("vllm"), window)
    with ThreadPoolExecutor(2) as pool:
        torches = list(pool.map(lambda engine: newest(needed("vllm", engine, "torch")), engines))
        distinct = sorted(set(torches))
        tritons = dict(
            zip(distinct, pool.map(lambda torch: newest(needed("torch", torch, "triton")), distinct), strict=True)
        )
    return [Release(engine, torch, tritons[torch]) for engine, torch in zip(engines, torches, strict=True)]


def newest_patches(candidates: list[str], window: str) -> list[str]:
    """The newest of every minor version in `window`, oldest minor first."""
    inside = sorted(SpecifierSet(window).filter(candidates), key=Version)
    return list({Version(version).release[:2]: version for version in inside}.values())


def newest(requirement: Requirement) -> str:
    """The newest release that `requirement` allows, as its public version: no build of somebody's own (+cpu)."""
    return Version(max(requirement.specifier.filter(released(requirement.name)), key=Version)).public


@cache
def released(name: str) -> list[str]:
    """All releases of a package that have a build for this machine."""
    listing = pip("index", "versions", name)
    (line,) = (line for line in listing.splitlines() if line.startswith("Available versions: "))
    return line.partition(": ")[2].split(", ")


def needed(package: str, version: str, dependency: str) -> Requirement:
    """What `package` asks of `dependency` on this machine."""
    report = json.loads(
        pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--quiet",
            "--report",
            "-",
            f"{package}==={version}",
        )
    )  # === is no +cpu either
    requirements = map(Requirement, report["install"][0]["metadata"]["requires_dist"])
    (found,) = (
        requirement
        for requirement in requirements
        if requirement.name == dependency and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    )
    return found


def environment(version: str) -> dict[str, str]:
    """Variables for a process of this Python in which `import triton` finds `version`, and kernels are compiled."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    paths = [str(install(version))] if version != installed_version("triton") else []
    if "PYTHONPATH" in inherited:
        paths.append(inherited["PYTHONPATH"])
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(FOLDER / "cache"),
    }


def install(version: str) -> Path:
    """The folder with this Triton; downloads it (200 MB) unless it is there. It appears whole or not at all."""
    folder = FOLDER / version
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f".{version}.") as partial:
            target = Path(partial) / "triton"
            pip("install", "--quiet", "--no-deps", "--target", str(target), f"triton=={version}")
            with suppress(OSError):  # another process was faster
                target.rename(folder)
    return folder


def pip(*arguments: str) -> str:
    """What pip prints."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{ADVICE}. pip {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    for release in releases():
        print(f"vllm {release.vllm:8} torch {release.torch:8} triton {release.triton}")
    print(f"installed here: triton {installed_version('triton')}")


if __name__ == "__main__":
    sys.exit(main())
