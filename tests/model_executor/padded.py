# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoints with zero neurons added, for stock engines that run some expert widths only."""

import json
from pathlib import Path

import torch
import vllm
from packaging.version import Version
from safetensors.torch import save_file

from heapr_vllm.checkpoint import TOKENIZER_FILES, Checkpoint, ExpertTensor

UNIT = 32  # of the CPU op; vLLM pads to it by itself from 0.28 on
NEEDED = Version(vllm.__version__) < Version("0.28")


def padded(model: Path, output: Path) -> Path:
    """A copy of equal outputs in `output`, or `model` itself if it is pruned or of a width the op runs."""
    checkpoint = Checkpoint(model)
    if "quantization_config" in checkpoint.config or not checkpoint.has_weights:
        return model
    width = next(iter(checkpoint.expert_shapes().values()))[1]
    missing = -width % UNIT
    if not missing:
        return model
    output.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            (output / name).write_bytes((model / name).read_bytes())
    key = "moe_intermediate_size" if "moe_intermediate_size" in checkpoint.config else "intermediate_size"
    config = checkpoint.config | {key: width + missing}
    (output / "config.json").write_text(json.dumps(config))
    tensors = {}
    for shard, names in checkpoint.shards.items():
        with checkpoint.open(shard) as file:
            tensors |= {name: _pad(name, file.get_tensor(name), width, missing) for name in names}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def _pad(name: str, tensor: torch.Tensor, width: int, missing: int) -> torch.Tensor:
    """An expert's matrix with `missing` more zero neurons, other tensors as they are.

    Models size their shared experts in multiples of a routed one.
    """
    if ExpertTensor.parse(name) is None and ".shared_experts." not in name:
        return tensor
    is_down = name.endswith((".down_proj.weight", ".w2.weight"))
    more = tensor.shape[1 if is_down else 0] // width * missing
    return torch.nn.functional.pad(tensor, (0, more) if is_down else (0, 0, 0, more))
