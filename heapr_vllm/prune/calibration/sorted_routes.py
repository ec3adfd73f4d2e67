# SPDX-License-Identifier: Apache-2.0
"""Routes of tokens to experts, as rows sorted by expert, and sums over them.

All of it runs on the device without a word to the host, in a number of launches that does not depend on the number of
experts. Sums are `embedding_bag`s: one pass that gathers, weighs and adds in float32 or better, in a fixed order on
GPUs too, where `index_add` uses atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SortedRoutes:
    """The R = T * top_k routes of T tokens.

    `order`: int64 [R], route t * top_k + k of each row.
    `place`: int64 [T, top_k], row of each route.
    `starts`: int64 [E], first row of each expert.
    `ends`: int32 [E], first row after each expert.
    """

    order: torch.Tensor
    place: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def sort(cls, top_k_index: torch.Tensor, num_experts: int) -> SortedRoutes:
        """Sorts the routes of `top_k_index` [T, top_k]; tokens stay in order inside an expert."""
        expert, order = top_k_index.flatten().sort(stable=True)
        experts = torch.arange(num_experts, dtype=expert.dtype, device=expert.device)
        starts = torch.searchsorted(expert, experts)
        ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
        return cls(order, order.argsort().view_as(top_k_index), starts, ends)

    @property
    def counts(self) -> torch.Tensor:
        """Number of rows per expert, int64 [E]."""
        return self.ends - self.starts

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copies `tokens` [T, C] to rows [R, C]."""
        return tokens.index_select(0, self.order // self.place.shape[1])

    def by_row(self, routes: torch.Tensor) -> torch.Tensor:
        """Brings one value per route, [T, top_k], into the order of rows, [R]."""
        return routes.flatten()[self.order]

    def by_route(self, rows: torch.Tensor) -> torch.Tensor:
        """Brings one value per row, [R], into the order of routes, [T, top_k]."""
        return rows[self.place]

    def sum_by_token(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Adds up `rows` [R, C] per token, times `weights` [T, top_k] if given: [T, C]."""
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(self.place, rows, mode="sum", per_sample_weights=weights)

    def by_expert(self, rows: torch.Tensor, how: str) -> torch.Tensor:
        """Reduces `rows` [R, C] per expert to [E, C], zero without a row; `how` is "sum" or "max"."""
        every = torch.arange(len(rows), device=rows.device)
        return F.embedding_bag(every, rows, self.starts, mode=how)
