# SPDX-License-Identifier: Apache-2.0
"""Weights [O, I] of 4 bits as base models are published: which tensors hold one, and how they become codes of 8 bits.

All have one scale, and all but symmetric ones one zero point, per output and `group_size` inputs. Codes less their zero
point are -15 to 15, so int8 holds them exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import BITWISE, ZERO_4_BITS, are_finite, unpack_nibbles

STORED_DTYPE = "I4"  # what a weight's header says; no file says it
PER_WORD = 8  # codes in an int32
WEIGHT = "weight"
GPTQ_ZEROS = (7, 8)  # symmetric: stored less one, or by GPTQModel's second version as it is
ZERO_POINT = "weight_zero_point"
INT32 = (torch.int32,)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {  # of what is needed of a weight
    "qweight": INT32,
    "qzeros": INT32,
    "scales": FLOATS,
    "weight_packed": INT32,
    ZERO_POINT: INT32,
    "weight_scale": FLOATS,
    "weight_shape": (torch.int32, torch.int64),
}
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in an int32 the next of eight outputs lies


@dataclass(frozen=True)
class Packing(ABC):
    """How a format stores weights of 4 bits.

    `codes`, `scale`, `others`: what the tensors of a module are called, "q_proj.qweight" and so on, all of them needed.
    `order`: that of the group of every input, which may be absent.
    """

    group_size: int
    codes: str
    scale: str
    others: tuple[str, ...]
    order: str

    @property
    @abstractmethod
    def is_symmetric(self) -> bool:
        """Whether codes less their zero point are -8 to 7."""

    @property
    def needed(self) -> tuple[str, ...]:
        """What the tensors of a weight are called."""
        return (self.codes, self.scale, *self.others)

    def part_of(self, name: str) -> tuple[str, str] | None:
        """Splits a tensor's name into that of the weight, "q_proj.weight", and what of it the tensor is; None of none.

        Other weights may have tensors of such names too: only beside `codes` are they parts.
        """
        module, _, part = name.rpartition(".")
        return (f"{module}.{WEIGHT}", part) if part in (*self.needed, self.order) else None

    def codes_of(self, weight: str) -> str:
        """Returns the name of the tensor with the codes of `weight`."""
        return f"{weight.removesuffix(WEIGHT)}{self.codes}"

    def shape(self, stored: tuple[int, ...], name: str) -> tuple[int, int]:
        """Returns [O, I] of a weight whose codes are stored as a tensor `name` of that shape. Raises HeaprError."""
        if len(stored) != 2:
            raise _damaged(name, f"is {list(stored)}, which is no matrix of codes")
        return self._shape(*stored)

    @abstractmethod
    def _shape(self, rows: int, columns: int) -> tuple[int, int]: ...

    @abstractmethod
    def _part_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Shapes of `scale` and `others` of a weight [outputs, inputs]."""

    @abstractmethod
    def _unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Codes int8 [O, I]."""

    @abstractmethod
    def _scale(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scales [O, ceil(I / group_size)] in their own dtype."""

    def check_complete(self, parts: Collection[str], name: str) -> None:
        """Raises HeaprError if one of the tensors of the weight `name` is not among `parts`."""
        if missing := set(self.needed) - set(parts):
            raise _damaged(name, f"has no {min(missing)} beside its {self.codes}")

    def unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns codes int8 [O, I] and scales [O, ceil(I / group_size)] of the weight `name`.

        `parts`: its tensors, by what they are called. Raises HeaprError if one is missing, of another shape or type, or
        if inputs are in another order than that of their groups.
        """
        self.check_complete(parts, name)
        for part in self.needed:
            if parts[part].dtype not in DTYPES[part]:
                raise _damaged(name, f"has {part} of {parts[part].dtype} instead of {DTYPES[part][-1]}")
        outputs, inputs = self.shape(tuple(parts[self.codes].shape), name)
        for part, wanted in self._part_shapes(outputs, inputs).items():
            if tuple(parts[part].shape) != wanted:
                raise _damaged(name, f"has {part} {list(parts[part].shape)} instead of {list(wanted)}")
        if self.order in parts:
            self._check_order(parts[self.order], inputs, name)
        scale = self._scale(parts)
        if not are_finite(scale):
            raise _damaged(name, "holds scales that are not finite")
        return self._unpack(parts, name).contiguous(), scale

    def _check_order(self, group_of_input: torch.Tensor, inputs: int, name: str) -> None:
        is_integer = group_of_input.dtype in (torch.int32, torch.int64)
        if not is_integer or not torch.equal(group_of_input.long(), torch.arange(inputs) // self.group_size):
            raise HeaprError(
                f"{name} has its inputs in another order than that of their groups (activation order), which is not "
                "supported; start from a base model that was quantized with desc_act false, or from the unquantized one"
            )


@dataclass(frozen=True)
class Gptq(Packing):
    """GPTQ, symmetric: qweight [I / 8, O] along inputs, lowest bits first; scales [I / g, O], qzeros [I / g, O / 8]."""

    codes: str = "qweight"
    scale: str = "scales"
    others: tuple[str, ...] = ("qzeros",)
    order: str = "g_idx"

    @property
    def is_symmetric(self) -> bool:
        return True

    def _shape(self, rows: int, columns: int) -> tuple[int, int]:
        return columns, rows * PER_WORD

    def _part_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        groups = -(-inputs // self.group_size)
        return {"scales": (groups, outputs), "qzeros": (groups, outputs // PER_WORD)}

    def _unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        zeros = set((_nibbles(parts["qzeros"]).unique() + ZERO_4_BITS).tolist())
        if len(zeros) != 1 or not zeros <= set(GPTQ_ZEROS):
            raise _damaged(name, f"is said to be symmetric and has zero points {sorted(zeros)}")
        return _nibbles(parts["qweight"].T)

    def _scale(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["scales"].T.contiguous()


@dataclass(frozen=True)
class Awq(Gptq):
    """AWQ, version GEMM: qweight [I, O / 8], qzeros [I / g, O / 8] along outputs, interleaved; scales [I / g, O]."""

    @property
    def is_symmetric(self) -> bool:
        return False

    def _shape(self, rows: int, columns: int) -> tuple[int, int]:
        return columns * PER_WORD, rows

    def _unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        codes, zeros = self._in_order(parts["qweight"]), self._in_order(parts["qzeros"])
        return _less_zeros(codes.T, zeros.T, self.group_size)

    @staticmethod
    def _in_order(packed: torch.Tensor) -> torch.Tensor:
        """int32 [n, m] to codes int8 [n, 8 m], one per output."""
        return _nibbles(packed).unflatten(1, (-1, PER_WORD))[:, :, AWQ_PLACES].flatten(1)


@dataclass(frozen=True)
class PackQuantized(Packing):
    """compressed-tensors' pack-quantized: weight_packed [O, I / 8] along inputs, weight_scale [O, I / g].

    Asymmetric ones have weight_zero_point [O / 8, I / g], packed along outputs.
    """

    codes: str = "weight_packed"
    scale: str = "weight_scale"
    others: tuple[str, ...] = ("weight_shape",)
    order: str = "weight_g_idx"

    @property
    def is_symmetric(self) -> bool:
        return ZERO_POINT not in self.others

    def _shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns * PER_WORD

    def _part_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        groups = -(-inputs // self.group_size)
        shapes = {
            "weight_scale": (outputs, groups),
            "weight_shape": (2,),
            ZERO_POINT: (-(-outputs // PER_WORD), groups),
        }
        return {part: shapes[part] for part in (self.scale, *self.others)}

    def _unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        codes = _nibbles(parts["weight_packed"])
        if parts["weight_shape"].tolist() != list(codes.shape):
            raise _damaged(name, f"has weight_shape {parts['weight_shape'].tolist()} and codes {list(codes.shape)}")
        if self.is_symmetric:
            return codes
        zeros = _nibbles(parts[ZERO_POINT].T).T[: len(codes)]
        return _less_zeros(codes, zeros, self.group_size)

    def _scale(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight_scale"]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] to codes int8 [n, 8 m] less 8, those in the lowest bits first."""
    rows = packed.clone(memory_format=torch.contiguous_format)  # with strides of rows, also if they have one word
    return unpack_nibbles(rows.view(BITWISE))


def _less_zeros(codes: torch.Tensor, zeros: torch.Tensor, group_size: int) -> torch.Tensor:
    """Subtracts zero points [O, ceil(I / group_size)] from codes [O, I]."""
    inputs = codes.shape[1]
    return codes - zeros.repeat_interleave(min(group_size, inputs), 1)[:, :inputs]


def _damaged(name: str, what: str) -> HeaprError:
    return HeaprError(f"{name} is damaged: it {what}; download the checkpoint again")
