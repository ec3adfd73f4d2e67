# SPDX-License-Identifier: Apache-2.0
"""What `heapr_vllm.register` does inside a vLLM process."""

from functools import cache


@cache
def register_once() -> None:
    """Registers the quantization method and the load format, both named `heapr`, and DeepSeekMoE's config.

    Warns outside the tested window of vLLM versions.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from heapr_vllm.formats.config import QUANT_METHOD
    from heapr_vllm.formats.deepseek_config import register_deepseek
    from heapr_vllm.model_executor.compat import warn_if_unsupported
    from heapr_vllm.model_executor.model_loader import HeaprModelLoader
    from heapr_vllm.model_executor.quantization import HeaprConfig

    warn_if_unsupported(vllm.__version__)
    register_quantization_config(QUANT_METHOD)(HeaprConfig)
    register_model_loader(QUANT_METHOD)(HeaprModelLoader)
    register_deepseek()
