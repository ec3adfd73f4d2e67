# SPDX-License-Identifier: Apache-2.0
"""The vLLM versions this plugin is tested with, and where they differ."""

import warnings
from typing import Any

from heapr_vllm.environment import SUPPORTED_VLLM, is_supported


def warn_if_unsupported(version: str) -> None:
    """Warns, and does not raise, so that a newer vLLM can be tried."""
    if not is_supported(version):
        warnings.warn(
            f"heapr-vllm is tested with vllm{SUPPORTED_VLLM}, this is {version}: if serving fails, install "
            f'a supported version with pip install "vllm{SUPPORTED_VLLM}"',
            stacklevel=2,
        )


def online_quantization(quant_config: Any) -> Any | None:
    """What vLLM is to quantize on top of a quantized checkpoint; it cannot before 0.30, which lacks the attribute."""
    return getattr(quant_config, "online_quantization_config", None)
