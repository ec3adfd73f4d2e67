# SPDX-License-Identifier: Apache-2.0
"""How long one kernel takes on a GPU that is modelled as SM slots sharing memory, L2 and tensor cores. No GPU is used.

CTAs take free slots in launch order, as on the hardware. Each has three phases: a prologue of given length, a main loop
as fast as its share of the slowest resource, an epilogue of given length. Shares change whenever a CTA begins or ends a
phase, so waves, tails and idle CTAs cost what they cost; contention inside an SM other than for its tensor cores, DRAM
pages, clocks that fall under load and the order of K steps are not modelled.
"""

from dataclasses import dataclass, fields

import numpy as np

PROLOGUE, MAIN_LOOP, EPILOGUE = range(3)
ROUNDING = 1e-12  # what rounding may leave of a phase, in seconds or in parts of the main loop


@dataclass(frozen=True)
class Gpu:
    """What all CTAs share. Bandwidths in bytes/s and as reached by a kernel, not the datasheet's; latencies in seconds.

    132 SMs and 989 TFLOP/s of dense bf16 are the datasheet's of both H100 SXM and H200. L2's bandwidth and the two
    latencies under load are assumed.
    """

    name: str
    dram_bandwidth: float
    l2_bandwidth: float = 5.5e12
    tensor_flops: float = 989e12
    sms: int = 132
    dram_latency_s: float = 1.0e-6
    l2_latency_s: float = 0.4e-6

    @property
    def sm_flops(self) -> float:
        """FLOP/s of one SM's tensor cores."""
        return self.tensor_flops / self.sms


GPUS = {
    "H100": Gpu("H100", 2.9e12),  # 87 % of the SXM datasheet's 3.35 TB/s, assumed
    "H200": Gpu("H200", 4.3e12),  # 90 % of the datasheet's 4.8 TB/s; vLLM's tuned MoE reaches 3.9 (its PR 44818)
}


@dataclass(frozen=True)
class Grid:
    """CTAs of one kernel in launch order, an array entry each; an idle CTA reads nothing and ends after its prologue.

    `l2_bytes`: all it reads. `dram_bytes`: the part of them that no CTA before it has brought into L2. `tensor_s`: its
    products if it had an SM to itself; CTAs on one SM take turns. `serial_s`: a chain of dependent steps that has this
    length however many CTAs are beside it. `bytes_in_flight`: what one CTA requests ahead, so that its reads are no
    faster than one such amount per latency.
    """

    prologue_s: np.ndarray
    dram_bytes: np.ndarray
    l2_bytes: np.ndarray
    tensor_s: np.ndarray
    serial_s: np.ndarray
    epilogue_s: float
    ctas_per_sm: int
    bytes_in_flight: float

    def __post_init__(self) -> None:
        lengths = {len(value) for field in fields(self) if isinstance(value := getattr(self, field.name), np.ndarray)}
        if len(lengths) != 1:
            raise ValueError(f"arrays of different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.prologue_s)


def simulate(grid: Grid, gpu: Gpu) -> float:
    """Seconds from the first CTA's start to the last one's end."""
    busy = grid.l2_bytes > 0
    launched = min(len(grid), gpu.sms * grid.ctas_per_sm)
    cta = np.arange(launched)
    sm = cta % gpu.sms  # the hardware fills SMs breadth first
    phase = np.full(launched, PROLOGUE)
    left = grid.prologue_s[:launched].copy()  # seconds, or in the main loop the part still to do
    now = 0.0
    while len(cta):
        speed = np.ones(len(cta))
        looping = phase == MAIN_LOOP
        if looping.any():
            speed[looping] = 1 / _main_loop_s(grid, gpu, cta[looping], sm[looping])
        step = float((left / speed).min())
        now += step
        left -= speed * step
        over = left <= ROUNDING
        begins_loop = over & (phase == PROLOGUE) & busy[cta]
        begins_epilogue = over & looping
        leaves = over & ~begins_loop & ~begins_epilogue
        phase[begins_loop], left[begins_loop] = MAIN_LOOP, 1.0
        phase[begins_epilogue], left[begins_epilogue] = EPILOGUE, grid.epilogue_s
        if leaves.any():
            freed = np.flatnonzero(leaves)[: len(grid) - launched]
            cta[freed] = np.arange(launched, launched + len(freed))
            phase[freed], left[freed] = PROLOGUE, grid.prologue_s[cta[freed]]
            launched += len(freed)
            leaves[freed] = False
            cta, sm, phase, left = (array[~leaves] for array in (cta, sm, phase, left))
    return now


def _main_loop_s(grid: Grid, gpu: Gpu, cta: np.ndarray, sm: np.ndarray) -> np.ndarray:
    """Length in seconds of the main loops of these CTAs, one at a time on slots of `sm`, as long as just they run."""
    dram_readers = max(np.count_nonzero(grid.dram_bytes[cta]), 1)
    dram_rate = min(gpu.dram_bandwidth / dram_readers, grid.bytes_in_flight / gpu.dram_latency_s)
    l2_rate = min(gpu.l2_bandwidth / len(cta), grid.bytes_in_flight / gpu.l2_latency_s)
    takers = np.bincount(sm, minlength=gpu.sms)[sm]
    return np.maximum.reduce(
        [
            grid.dram_bytes[cta] / dram_rate,
            grid.l2_bytes[cta] / l2_rate,
            grid.tensor_s[cta] * takers,
            grid.serial_s[cta],
        ]
    )
