# SPDX-License-Identifier: Apache-2.0
"""HEAPr expert pruning, scored offline and served with variable-width experts in vLLM.

`heapr_vllm.prune` turns a checkpoint and text into retained-neuron masks, `heapr_vllm.model_executor` serves them.
Importing this package imports neither vLLM nor torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("heapr-vllm")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0.0.0+source"


def register() -> None:
    """Entry point `vllm.general_plugins`: teaches vLLM the `heapr` quantization method and load format.

    vLLM calls it in every process, possibly more than once; later calls do nothing.
    """
    from heapr_vllm.model_executor.registration import register_once

    register_once()
