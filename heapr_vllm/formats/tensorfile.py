# SPDX-License-Identifier: Apache-2.0
"""safetensors files with one JSON metadata entry.

A single sorted entry keeps the file byte-reproducible; safetensors writes several entries in random order.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.schema import parse_json

FORMAT_VERSION = 1
METADATA_KEY = "heapr"


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], version: int = FORMAT_VERSION
) -> None:
    """Writes `tensors` and `metadata` (plus `version` as `format_version`) to `path`, atomically."""
    text = json.dumps({"format_version": version, **metadata}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file(path, lambda partial: save_file(tensors, partial, metadata={METADATA_KEY: text}))


def load_tensors(path: Path, version: int = FORMAT_VERSION) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote.

    Raises HeaprError if the file is missing, damaged, not one of ours, or of a format newer than `version`.
    """
    if not path.is_file():
        raise HeaprError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HeaprError(f"{path} is damaged ({error}); create or download it again") from error
    if header is None:
        raise HeaprError(f"{path} was not written by heapr: its safetensors metadata has no '{METADATA_KEY}' entry")
    metadata = parse_json(header, dict[str, Any], f"{path}: its metadata", "create or download it again")
    if not isinstance(metadata.get("format_version"), int):
        raise HeaprError(f"{path} is damaged: its metadata has no format_version; create or download it again")
    if metadata["format_version"] > version:
        raise HeaprError(
            f"{path} has format version {metadata['format_version']}, this heapr-vllm reads up to "
            f"{version}; upgrade heapr-vllm"
        )
    return tensors, metadata
