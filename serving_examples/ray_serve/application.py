# SPDX-License-Identifier: Apache-2.0
"""Ray Serve LLM: an OpenAI-compatible endpoint with autoscaled replicas of a pruned model.

    pip install "ray[serve,llm]>=2.60"             # brings a vLLM of the supported window
    pip wheel --no-deps -w /models .               # in a checkout of heapr-vllm; /models is storage that all nodes see
    serve run serving_examples.ray_serve.application:build model=/models/pruned accelerator_type=H100 \
        wheel=/models/heapr_vllm-0.1.0-py3-none-any.whl
    curl localhost:8000/v1/models

Without `wheel` the cluster's image has the plugin (../Dockerfile). On CPUs: `device=cpu`, no accelerator_type. Other
names are options of vLLM's engine, as tensor_parallel_size=2. `serve build` makes a config file of the same
application, with room for all settings of Ray Serve.

On CPUs an engine stays within one Ray worker: vLLM's Ray executor, which spreads it over several, ends there with
"current platform cpu does not support ray" (0.32), and Ray Serve LLM uses vLLM's own processes instead.
"""

from typing import Any, Literal

import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

PLUGIN_REQUIREMENTS = ["safetensors>=0.8"]


class Settings(BaseModel, extra="allow"):
    """What `serve run` takes as KEY=VALUE.

    `model` is the output of `heapr export` on storage that all nodes see, or a Hub id; for a masks repository over its
    base, the masks with `load_format=heapr`. `wheel` puts the plugin beside vLLM in every replica and engine worker, on
    all nodes.
    """

    model: str
    name: str = "pruned"
    device: Literal["gpu", "cpu"] = "gpu"
    accelerator_type: str | None = None
    wheel: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: int = 32
    upscale_delay_s: float = 30

    def engine(self) -> dict[str, Any]:
        """Options of vLLM's engine; the command line has them as text."""
        others = self.model_extra or {}
        return {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in others.items()}


def build(settings: Settings) -> Application:
    """The application: a router and `min_replicas` to `max_replicas` engines. Raises ValueError as LLMConfig does."""
    return build_openai_app({"llm_configs": [llm_config(settings)]})


def llm_config(settings: Settings) -> LLMConfig:
    """The engine and its replicas in Ray Serve's words."""
    return LLMConfig(
        model_loading_config={"model_id": settings.name, "model_source": settings.model},
        accelerator_config={"kind": settings.device},
        accelerator_type=settings.accelerator_type,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": settings.upscale_delay_s,
            }
        },
        engine_kwargs=settings.engine(),
        runtime_env=plugin_environment(settings.wheel),
    )


def plugin_environment(wheel: str | None) -> dict:
    """Ray's runtime environment with the plugin in it; --no-deps keeps the cluster's torch and vLLM."""
    if wheel is None:
        return {}
    return {"pip": {"packages": [wheel, *PLUGIN_REQUIREMENTS], "pip_install_options": ["--no-deps"]}}
