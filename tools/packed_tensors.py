# SPDX-License-Identifier: Apache-2.0
"""Hostile versions of a base model of 4 bits: tensors of an expert that are gone, of other types, shapes or bytes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.formats import sizes
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import SINGLE_FILE, Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import SCALE_SUFFIX
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.model_executor.unpacking import unpacked
from tests import quantized_models
from tools.hostile import Chooser

EXPERTS = "model.layers.0.mlp.experts"
FORMS = [name for name in quantized_models.FOUR_BITS if not name.endswith("linears")]
HIDDEN_SIZE = 64
SHAPES = {"gate": (96, HIDDEN_SIZE), "up": (96, HIDDEN_SIZE), "down": (HIDDEN_SIZE, 96)}
GROUP_SIZES = (32, 64, 128, 1024, 48, 0, -1)  # which config.json says; the first is right
SMALLEST = torch.finfo(torch.float32).tiny  # below it steps are rounded themselves
SIZES = (0, 1, 2, 3, 8, 12, 64, 96)
DTYPES = (torch.int32, torch.int64, torch.int8, torch.uint8, torch.uint32, torch.bool, torch.float32, torch.float16)
DTYPES += (torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64)  # of safetensors


class PackedTensors:
    """A checkpoint of one expert in a format of 4 bits, written into `folder`."""

    def __init__(self, form: str, folder: Path) -> None:
        self.name = f"tensors of {form}"
        self.folder = folder
        self.block = quantized_models.block(form, [])
        self.valid: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for matrix, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator) / 10
            self.valid |= quantized_models.stored(f"{EXPERTS}.0.{matrix}_proj.weight", weight, form)
        folder.mkdir()

    def attack(self, choose: Chooser) -> None:
        """Reads a hostile version; whatever the reader raises goes through."""
        tensors = dict(self.valid)
        for _ in range(choose.ConsumeIntInRange(0, 3)):
            name = _one_of(choose, sorted(tensors))
            tensor = _changed(tensors.pop(name), choose)
            if tensor is not None:
                tensors[name] = tensor
        self._write(tensors, GROUP_SIZES[max(0, choose.ConsumeIntInRange(-20, len(GROUP_SIZES) - 1))])
        self._read()

    def _write(self, tensors: dict[str, torch.Tensor], group_size: int) -> None:
        text = json.dumps(self.block).replace(f'"group_size": {quantized_models.BLOCK}', f'"group_size": {group_size}')
        config = {"hidden_size": HIDDEN_SIZE, "quantization_config": json.loads(text)}
        (self.folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, self.folder / SINGLE_FILE)

    def _read(self) -> None:
        """Whatever is read is finite, of the shape that headers promise, and the same in memory and in an export."""
        checkpoint = Checkpoint(self.folder)
        shapes = checkpoint.expert_shapes()
        sizes.export_bytes(checkpoint)
        base = checkpoint.kept_quantization
        with TensorReader(checkpoint, torch.float32) as reader:
            values = {name: reader.tensor(name) for name in checkpoint.packed}
            exported: dict[str, torch.Tensor] = {}
            for name in checkpoint.packed:
                exported |= reader.verbatim(name)
        assert base is not None
        for name, value in values.items():
            assert tuple(value.shape) == checkpoint.headers[name][1] and bool(value.isfinite().all()), name
            _check_exported(name, value, exported, base)
        held = {prefix: range(num_experts) for prefix, (num_experts, _) in shapes.items()}
        served = dict(unpacked(load_file(self.folder / SINGLE_FILE).items(), checkpoint, held))
        assert served.keys() >= exported.keys()
        for name, tensor in exported.items():
            assert torch.equal(served[name], tensor), name


def _check_exported(name: str, value: torch.Tensor, exported: dict[str, torch.Tensor], base: BaseQuantization) -> None:
    """Gate and up have the very values, down is off by half a step of 8 bits."""
    where = ExpertTensor.parse(name)
    assert where is not None, name
    is_down = where.shard == "w2"
    scheme = base.scheme(value.shape[0 if is_down else 1])
    scale = exported[name + SCALE_SUFFIX]
    found = scheme.dequantize(exported[name], scale, where.shard)
    if not is_down:
        assert torch.equal(found, value), name
        return
    steps = scale.repeat_interleave(scheme.group_size or 1, 0)
    assert bool(((found - value).abs() <= steps * 0.501 + SMALLEST).all()), name


def _one_of(choose: Chooser, entries: Sequence[Any]) -> Any:
    return entries[choose.ConsumeIntInRange(0, len(entries) - 1)]


def _changed(tensor: torch.Tensor, choose: Chooser) -> torch.Tensor | None:
    """The tensor with other bytes, of another type or shape; None for none."""
    kind = choose.ConsumeIntInRange(0, 7)
    if kind == 7:
        return None
    shape, dtype = tuple(tensor.shape), tensor.dtype
    numbers = tensor.flatten().view(torch.uint8).clone() if tensor.numel() else torch.zeros(1, dtype=torch.uint8)
    if kind == 1:
        shape = tuple(_one_of(choose, SIZES) for _ in range(choose.ConsumeIntInRange(0, 3)))
    elif kind == 2:
        dtype = _one_of(choose, DTYPES)
    elif kind == 3:
        numbers.fill_(choose.ConsumeIntInRange(0, 255))
    else:
        for _ in range(choose.ConsumeIntInRange(1, 8)):
            numbers[choose.ConsumeIntInRange(0, len(numbers) - 1)] = choose.ConsumeIntInRange(0, 255)
    size = math.prod(shape) * dtype.itemsize
    numbers = numbers.repeat(1 + size // len(numbers))[:size]
    return (numbers > 127).view(shape) if dtype == torch.bool else numbers.view(dtype).view(shape)


def packed_tensors(work: Path) -> list[PackedTensors]:
    """One for every way that `four_bits.py` reads, in folders in `work`."""
    return [PackedTensors(name, work / name) for name in FORMS]
