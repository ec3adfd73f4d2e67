# SPDX-License-Identifier: Apache-2.0
"""What the pruned layers of a served model are made of; a module of its own, because workers unpickle the function."""

from typing import Any


def pruned_layers(model: Any) -> list[tuple[str, list[int], list[int]]]:
    """Kernel, kept and stored widths of the experts that a rank holds, by layer."""
    methods = [module.quant_method for module in model.modules() if hasattr(module, "heapr_table")]
    return [
        (
            method.kernel.name,
            list(method.storage.layout.widths),
            [width for _, width in method.storage.layout.expert_table()],
        )
        for method in methods
    ]
