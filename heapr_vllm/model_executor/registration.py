# SPDX-License-Identifier: Apache-2.0
"""What `heapr_vllm.register` does inside a vLLM process."""

from functools import cache


@cache
def register_once() -> None:
    """Registers the quantization method and the load format, both named `heapr`, and DeepSeekMoE's config.

    What vLLM reads with its default loader goes through our subclass of it, which changes nothing for models that are
    not pruned. Warns outside the tested window of vLLM versions.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader, register_model_loader

    from heapr_vllm.formats.config import QUANT_METHOD
    from heapr_vllm.formats.deepseek_config import register_deepseek
    from heapr_vllm.model_executor.compat import warn_if_unsupported
    from heapr_vllm.model_executor.model_loader import CompleteModelLoader, HeaprModelLoader
    from heapr_vllm.model_executor.quantization import HeaprConfig

    warn_if_unsupported(vllm.__version__)
    register_quantization_config(QUANT_METHOD)(HeaprConfig)
    register_model_loader(QUANT_METHOD)(HeaprModelLoader)
    defaults = [name for name, loader in _LOAD_FORMAT_TO_MODEL_LOADER.items() if loader is DefaultModelLoader]
    _LOAD_FORMAT_TO_MODEL_LOADER.update(dict.fromkeys(defaults, CompleteModelLoader))
    register_deepseek()
