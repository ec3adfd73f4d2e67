# SPDX-License-Identifier: Apache-2.0
"""Numbers of threads, on which no kernel's result may depend."""

from collections.abc import Callable

import torch


def outputs_by_threads(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` returns on one, two and three threads."""
    outputs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(run())
    finally:
        torch.set_num_threads(threads)
    return outputs
