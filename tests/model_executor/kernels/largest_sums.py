# SPDX-License-Identifier: Apache-2.0
"""One expert with the largest sums of products that 8 bits allow, which no kernel may round."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from heapr_vllm.model_executor.kernels.base import ExpertRows, Scales
from heapr_vllm.model_executor.storage.layout import RaggedLayout

LARGEST_CODE = 127
Run = Callable[[torch.Tensor, ExpertRows, RaggedLayout], torch.Tensor]


def check_largest_sums(run: Run, tokens: int, group_size: int | None) -> None:
    """Runs the largest products there are: -128 times 127 or -127 over all of K, and random codes.

    Activations are integers up to 127, so rounding changes none. silu(g) is g for such g, one neuron's product passes
    on as 127 steps, and a column of down with the largest code shows it. `run`: the output for tokens and an expert as
    it is loaded. Raises AssertionError if that is not the sums.
    """
    hidden, width, generator = 512, 64, torch.Generator().manual_seed(tokens)
    groups = hidden // group_size if group_size else 1
    x = torch.randint(-127, 128, (tokens, hidden), generator=generator).float()
    x[:, ::32] = 127
    x[0] = -127
    w13, w2 = (torch.zeros(rows, hidden, dtype=torch.int8) for rows in (2 * width, width))
    w13[3] = torch.randint(-128, 128, (hidden,), generator=generator) | (x[-1] > 0)
    w13[3, x[-1] <= 0] = -128
    w13[width + 3] = -128
    w2[3] = LARGEST_CODE
    gate, up = (x.double() @ w13[row].double() for row in (3, width + 3))
    scales = Scales(torch.ones(2 * width, groups), torch.ones(width, groups) if group_size else torch.ones(1, hidden))
    layout = RaggedLayout.build([width], [width])
    output = run(x, ExpertRows(w13, w2, torch.tensor(layout.expert_table()), width, scales=scales), layout)
    wanted = (LARGEST_CODE * F.silu(gate) * up)[:, None].expand(-1, hidden)
    torch.testing.assert_close(output.double().cpu(), wanted, rtol=5e-7, atol=1e-6)
