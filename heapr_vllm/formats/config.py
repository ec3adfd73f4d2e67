# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` block of a pruned model's config.json, which vLLM hands to the plugin."""

from dataclasses import asdict, dataclass, field
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.schema import convert

FORMAT_VERSION = 2  # 2 adds `inner` and `experts`

QUANT_METHOD = "heapr"
MASKS_FILE = "heapr/masks.safetensors"
NOTE = "vLLM serves this with the plugin heapr-vllm; `heapr unpack` writes full-size weights for any engine"
LAYOUTS = ("masks", "compact")


@dataclass(frozen=True)
class BaseModel:
    """The unpruned model: repository id or path, revision, and what `formats/fingerprint.py` takes of it."""

    name_or_path: str = ""
    revision: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class PruningConfig:
    """How to serve a pruned model.

    `layout`: "compact" if the weights in the repository have the kept widths, "masks" if full-size weights (of
    `base_model`, or in the repository itself) are sliced while loading. `masks`: path inside the repository, or a local
    path or repository id given by the user. `repair`: method by which the kept weights were refitted, if they were.
    `inner`: `quantization_config` of the base model, for all that is not a pruned expert; None if it has none.
    `experts`: how pruned experts are stored, the fields of `ExpertScheme`; None for the model's dtype in compact
    checkpoints, and as the base model stores them under masks.
    """

    masks: str = MASKS_FILE
    layout: str = "masks"
    masks_sha256: str | None = None
    sparsity: float | None = None
    scope: str | None = None
    align: int | None = None
    repair: str | None = None
    base_model: BaseModel = field(default_factory=BaseModel)
    inner: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    @property
    def expert_scheme(self) -> ExpertScheme | None:
        """Raises HeaprError if no kernel decodes it."""
        return ExpertScheme.from_dict(self.experts) if self.experts else None

    def to_dict(self) -> dict[str, Any]:
        """Lists all fields, a note for readers, and `scale_fmt` of `inner` where vLLM looks for it: here."""
        scale_format = {"scale_fmt": self.inner["scale_fmt"]} if self.inner and "scale_fmt" in self.inner else {}
        return {"quant_method": self.quant_method, "note": NOTE} | asdict(self) | scale_format

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> "PruningConfig":
        """Parses the block; unknown keys are ignored, so that later versions may add some.

        Raises HeaprError on values of another type, a newer format version, an unknown layout, or experts stored in an
        unknown way.
        """
        config = convert(block, cls, "quantization_config", "create or download the model again")
        if config.format_version > FORMAT_VERSION:
            raise HeaprError(
                f"quantization_config has format_version {config.format_version}, this heapr-vllm reads "
                f"up to {FORMAT_VERSION}; upgrade heapr-vllm"
            )
        if config.layout not in LAYOUTS:
            raise HeaprError(f"quantization_config.layout is {config.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if config.inner is not None and not isinstance(config.inner.get("quant_method"), str):
            raise HeaprError("quantization_config.inner names no quant_method; create or download the model again")
        _ = config.expert_scheme
        return config
