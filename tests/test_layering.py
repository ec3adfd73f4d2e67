# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and the one window of supported vLLM versions."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from heapr_vllm.environment import SUPPORTED_VLLM, is_supported
from heapr_vllm.model_executor.compat import warn_if_unsupported

ROOT = Path(__file__).parent.parent


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_layers() -> None:
    """`prune` and the root never import vLLM, `model_executor` never imports `prune`."""
    for path in (ROOT / "heapr_vllm").rglob("*.py"):
        forbidden = {
            "prune": ("vllm.", "heapr_vllm.model_executor."),
            "model_executor": ("heapr_vllm.prune.",),
            "heapr_vllm": ("vllm.",),
        }[path.parent.name]
        for name in imports_of(path):
            assert not (name + ".").startswith(forbidden), f"{path} imports {name}"


def test_importing_the_package_is_light() -> None:
    code = "import sys, heapr_vllm, heapr_vllm.cli; print('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_window_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm{SUPPORTED_VLLM}"]
    assert f"`vllm{SUPPORTED_VLLM}`" in (ROOT / "README.md").read_text()


def test_versions_outside_the_window_warn() -> None:
    assert is_supported("0.26.0") and is_supported("0.32.0+cpu") and is_supported("0.33.1")
    assert not is_supported("0.25.1") and not is_supported("0.34.0")
    with pytest.warns(UserWarning, match=r"tested with vllm>=0.26,<0.34, this is 0.40.0.* pip install"):
        warn_if_unsupported("0.40.0")
