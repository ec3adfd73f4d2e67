# SPDX-License-Identifier: Apache-2.0
"""What every kernel for experts of variable width takes and can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from heapr_vllm.formats.quantized import PACKED_DTYPE, ExpertScheme
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up
from heapr_vllm.model_executor.storage.scales import Scales
from heapr_vllm.model_executor.storage.traffic_sums import TrafficSums


@dataclass(frozen=True)
class Routes:
    """Which experts the tokens of a call go to.

    weights: float [T, k], router weights.
    ids: int32 [T, k], global expert ids; -1 for a route of another rank, which adds nothing.
    slots: int32 [num_experts + 1], from `RaggedKernel.index_tables`.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class ExpertRows:
    """The experts of a layer that are stored here, as `RaggedKernel.pack` left them.

    w13: [2 * rows, H], gate and up; of the model's dtype, or int8 or float8_e4m3fn codes, or uint8 [2 * rows, H / 2]
        of two codes of 4 bits each.
    w2: [rows, H], down, likewise.
    table: where an expert's rows lie, from `RaggedKernel.index_tables`.
    max_width: widest stored width.
    uniform_experts: number of experts if all of the model's are here, in order and at one stored width, otherwise 0.
    scales: of codes; None for the model's dtype.
    traffic: where kernels that can add up the tokens of a call do so; None if nobody wants it.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    table: torch.Tensor
    max_width: int
    uniform_experts: int = 0
    scales: Scales | None = None
    traffic: TrafficSums | None = None

    @property
    def is_packed(self) -> bool:
        """Whether codes of down_proj are of 4 bits, two to a byte; those of gate and up then are too."""
        return self.w2.dtype == PACKED_DTYPE

    @property
    def hidden_size(self) -> int:
        """Counts H, of which a byte of packed codes holds two."""
        return self.w2.shape[1] * (2 if self.is_packed else 1)


class RaggedKernel(ABC):
    """One way to run a layer. Stateless; `choice.py` asks all in order, and where several run, they are timed.

    activation_bits: what it rounds activations to before products; None if it leaves them as they are.
    share_unit: neurons that a tensor-parallel rank's share of an expert is a multiple of.
    width_unit: neurons that stored widths are multiples of.
    adds_up_traffic: whether it knows `ExpertRows.traffic`.
    takes_two_widths: whether down_proj may have more bits than gate and up, which are widened for it otherwise.
    """

    name: ClassVar[str]
    activation_bits: ClassVar[int | None] = None
    share_unit: ClassVar[int] = 16
    width_unit: ClassVar[int] = 1
    adds_up_traffic: ClassVar[bool] = False
    takes_two_widths: ClassVar[bool] = False

    def is_default(self) -> bool:
        """Whether it may be taken unasked on machines of this kind."""
        return True

    def machine_obstacle(self) -> str | None:
        """Why it runs no layer on this machine, with the remedy; None if it does."""
        return None

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        """Why it does not run layers of this type and size, with the remedy; None if it does.

        `scheme`: how experts are stored; None in `dtype`.
        """
        return None

    def stored_widths(self, widths: list[int]) -> list[int]:
        """Returns the stored width of every local expert, at least its kept width."""
        return [round_up(width, self.width_unit) for width in widths]

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        """Brings loaded parameters (`storage/layout.py` says what their rows are) into its own order, in place."""
        return

    def index_tables(self, slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what it finds an expert's rows by: `Routes.slots` and `ExpertRows.table`.

        `slots`: storage slot of every global expert, `layout.num_slots` if it is not stored here. By default int32
        [num_experts + 1], `slots` and in the last place the slot of no expert, which -1 finds; and int32
        [num_slots, 2], first row and stored width by slot.
        """
        return slots_table(slots, layout), torch.tensor(layout.expert_table(), dtype=torch.int32).view(-1, 2)

    def warm_up(
        self,
        slots: torch.Tensor,
        experts: ExpertRows,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Compiles what calls of up to `max_tokens` tokens of `dtype`, or None for the weights' own, may need."""
        return

    @abstractmethod
    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        """Writes the weighted sum over the top-k stored experts of `x` [T, H] into `output` [T, H]."""

    def run_in_graph(
        self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows, recorded: str = ""
    ) -> None:
        """Does as `run` in a forward pass that torch.compile may trace: as one op that it does not look into.

        `recorded`: name of the layer in `RECORDED`, whose sums take the place of `experts.traffic`.
        """
        torch.ops.heapr.ragged_moe(
            output,
            x,
            experts.w13,
            experts.w2,
            routes.weights,
            routes.ids,
            routes.slots,
            experts.table,
            experts.max_width,
            self.name,
            experts.scales.w13 if experts.scales else None,
            experts.scales.w2 if experts.scales else None,
            recorded,
        )


def slots_table(slots: Sequence[int], layout: RaggedLayout) -> torch.Tensor:
    """int32 [num_experts + 1]: `slots`, and in the last place the slot of no expert, which id -1 finds."""
    return torch.tensor([*slots, layout.num_slots], dtype=torch.int32)
