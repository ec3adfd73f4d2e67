# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint read without instantiating the model: shards, expert tensors, formats."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats import four_bits
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.config import QUANT_METHOD, PruningConfig
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.four_bits import Packing
from heapr_vllm.formats.hub import download, download_checkpoint
from heapr_vllm.formats.names import ExpertTensor, is_draft_layer, natural_order
from heapr_vllm.formats.quantized import SCALE_SUFFIX, STORED_DTYPES, STORED_PACKED_DTYPE, ExpertScheme
from heapr_vllm.formats.schema import Count, Positive, convert, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "added_tokens.json",
)
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json")

DOWNLOAD_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class TextConfig:
    """The fields of a language model's config.json that are read without transformers."""

    hidden_size: Positive | None = None
    num_hidden_layers: Count | None = None
    max_position_embeddings: Positive | None = None
    vocab_size: Positive | None = None
    num_experts_per_tok: Positive | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


@dataclass(frozen=True)
class Index:
    """What is read of `model.safetensors.index.json`: tensor name -> shard file name."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint directory."""

    path: Path

    @classmethod
    def resolve(cls, name_or_path: str | Path, revision: str | None = None) -> Checkpoint:
        """Opens a directory, or downloads a Hub repository. Raises HeaprError if there is none."""
        if not str(name_or_path):
            raise HeaprError("no model is named; say which with --model or `base_model`")
        path = Path(name_or_path)
        if not path.is_dir():
            path = download_checkpoint(str(name_or_path), revision, ["*.json", "*.safetensors", *SIDE_FILES])
        checkpoint = cls(path)
        if not (path / "config.json").is_file():
            raise HeaprError(f"{path} holds no config.json; MODEL is a Hugging Face checkpoint directory or Hub id")
        return checkpoint

    @classmethod
    def described(cls, name_or_path: str, revision: str | None = None) -> Checkpoint:
        """Opens a directory, or of a Hub repository its config.json alone. Raises HeaprError if there is none."""
        if Path(name_or_path).is_dir():
            return cls.resolve(name_or_path)
        return cls(download(name_or_path, "config.json", revision).parent)

    @property
    def commit(self) -> str | None:
        """Commit of a Hub snapshot, None for a plain directory."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def has_weights(self) -> bool:
        return any((self.path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(inside(self.path, "config.json"), dict[str, Any], DOWNLOAD_AGAIN)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> shard file name, where a weight of 4 bits is one tensor X.weight, whatever the shard has.

        Raises HeaprError if there are no safetensors, a shard is missing, or weights are in a format not supported.
        """
        parts = {part for stored in self.packed.values() for part in stored.values()}
        weight_map = {name: shard for name, shard in self.stored_map.items() if name not in parts}
        for weight in self.packed:
            weight_map[weight] = self.stored_map[self._packing.codes_of(weight)]
        return weight_map

    @cached_property
    def packed(self) -> dict[str, dict[str, str]]:
        """Weight of 4 bits -> what its tensors are called (`four_bits.py`) -> their names."""
        if self.base_quantization is None or self.base_quantization.packing is None:
            return {}
        packed: dict[str, dict[str, str]] = {}
        for name in self.stored_map:
            found = self._packing.part_of(name)
            if found and self._packing.codes_of(found[0]) in self.stored_map:
                packed.setdefault(found[0], {})[found[1]] = name
        return packed

    @property
    def _packing(self) -> Packing:
        base = self.base_quantization
        assert base is not None and base.packing is not None, "only weights of 4 bits are packed"
        return base.packing

    @cached_property
    def stored_map(self) -> dict[str, str]:
        """Name of a tensor in a shard -> shard file name. Raises HeaprError as `weight_map` does."""
        if (self.path / INDEX_FILE).is_file():
            weight_map = read_json(inside(self.path, INDEX_FILE), Index, DOWNLOAD_AGAIN).weight_map
            for shard in sorted(set(weight_map.values())):
                if not inside(self.path, shard).is_file():
                    raise HeaprError(
                        f"{self.path / shard} is missing although {INDEX_FILE} lists it; download the checkpoint again"
                    )
            return weight_map
        if not inside(self.path, SINGLE_FILE).is_file():
            raise HeaprError(f"{self.path} holds no safetensors weights; save the model with save_pretrained")
        with self.open(SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    @property
    def shards(self) -> dict[str, list[str]]:
        """Shard file name -> its tensor names as `weight_map` has them, both sorted."""
        return _by_shard(self.weight_map)

    @contextmanager
    def open(self, shard: str) -> Generator[Any]:
        """Yields the shard as a `safetensors.safe_open` handle. Raises HeaprError if it is damaged or lacks a tensor.

        Shards are read, not mapped: a mapping takes address space of the whole shard, and memory of what was read.
        """
        try:
            with safe_open(self.path / shard, framework="pt", backend="pread") as file:
                yield file
        except SafetensorError as error:
            raise HeaprError(f"{self.path / shard} is damaged ({error}); download it again") from error

    @cached_property
    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape), read from the shard headers alone; a weight of 4 bits is ("I4", [O, I])."""
        stored = self.stored_headers
        headers = {name: stored[name] for name in self.weight_map if name not in self.packed}
        for weight, parts in self.packed.items():
            self._packing.check_complete(parts, weight)
            shape = stored[self._packing.codes_of(weight)][1]
            headers[weight] = (four_bits.STORED_DTYPE, self._packing.shape(shape, weight))
        return headers

    @cached_property
    def stored_headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `headers`, of the tensors as the shards have them."""
        headers = {}
        for shard, names in _by_shard(self.stored_map).items():
            with self.open(shard) as file:
                for name in names:
                    view = file.get_slice(name)
                    headers[name] = (view.get_dtype(), tuple(view.get_shape()))
        return headers

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Lists prefix -> (num_experts, moe_intermediate_size), without draft layers for multi-token prediction.

        Raises HeaprError if there are no routed experts or an expert lacks a tensor.
        """
        present: dict[str, set[tuple[int, str]]] = {}
        widths: dict[str, int] = {}
        for name, (_, shape) in self.headers.items():
            tensor = ExpertTensor.parse(name)
            if tensor is None or self.is_draft(tensor.prefix):
                continue
            if tensor.shard == "w2":
                widths[tensor.prefix] = shape[-1]
            if len(shape) != (3 if tensor.expert is None else 2):
                raise HeaprError(f"{self.path}: {name} is {list(shape)}, which is no expert's weight; {DOWNLOAD_AGAIN}")
            experts = range(shape[0]) if tensor.expert is None else [tensor.expert]
            shards = ("w1", "w3") if tensor.shard == "w13" else (tensor.shard,)
            present.setdefault(tensor.prefix, set()).update(product(experts, shards))
        if not present:
            model_type = self.config.get("model_type", "unknown")
            raise HeaprError(f"{self.path} (model_type {model_type}) has no routed experts; HEAPr prunes MoE models")
        shapes = {}
        for prefix in sorted(present, key=natural_order):
            num_experts = 1 + max(expert for expert, _ in present[prefix])
            missing = 3 * num_experts - len(present[prefix])
            if missing:
                wanted = product(range(num_experts), ("w1", "w2", "w3"))
                expert, shard = next(each for each in wanted if each not in present[prefix])
                raise HeaprError(
                    f"{self.path} lacks {shard} of {prefix}.{expert} and {missing - 1} more expert tensors; "
                    f"{DOWNLOAD_AGAIN}"
                )
            shapes[prefix] = (num_experts, widths[prefix])
        return shapes

    def is_draft(self, prefix: str) -> bool:
        """Tells whether an MoE module belongs to multi-token prediction, which is never pruned."""
        return is_draft_layer(prefix, self.text.num_hidden_layers)

    def copy_side_files(self, folder: Path) -> None:
        """Copies SIDE_FILES, as far as they are there, into `folder`."""
        for name in SIDE_FILES:
            if inside(self.path, name).is_file():
                shutil.copyfile(self.path / name, folder / name)

    def check_readable(self) -> None:
        """Raises HeaprError if a shard is missing, cut short, or lacks a tensor of the index. Reads headers only."""
        for shard, names in _by_shard(self.stored_map).items():
            with self.open(shard) as file:
                if missing := sorted(set(names) - set(file.keys())):
                    raise HeaprError(
                        f"{self.path / shard} lacks {missing[0]} although {INDEX_FILE} lists it; "
                        "download the checkpoint again"
                    )

    def is_pruned_expert(self, name: str) -> bool:
        """Tells whether a tensor is a weight that pruning cuts."""
        where = ExpertTensor.parse(name)
        return where is not None and not self.is_draft(where.prefix)

    @cached_property
    def text(self) -> TextConfig:
        """What is read of the language model's config."""
        config = self.config.get("text_config") or self.config
        return convert(config, TextConfig, str(self.path / "config.json"), DOWNLOAD_AGAIN)

    @property
    def hidden_size(self) -> int:
        """Raises HeaprError if the config does not say."""
        if self.text.hidden_size is None:
            raise HeaprError(f"{self.path / 'config.json'} has no hidden_size; {DOWNLOAD_AGAIN}")
        return self.text.hidden_size

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` as config.json has it; of a pruned model that of the plugin."""
        config, text = self.config, self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        block = config.get("quantization_config") or nested or config.get("compression_config")
        if block is None:
            return None
        return convert(block, dict[str, Any], f"{self.path / 'config.json'}: quantization_config", DOWNLOAD_AGAIN)

    @cached_property
    def pruning(self) -> PruningConfig | None:
        """How the plugin serves the model; None if it is not pruned. Raises HeaprError on a newer format."""
        block = self.quantization
        is_pruned = block is not None and block.get("quant_method") == QUANT_METHOD
        return PruningConfig.from_dict(block) if block and is_pruned else None

    @cached_property
    def base_quantization(self) -> BaseQuantization | None:
        """Format of 8-bit and 4-bit weights, of a pruned model those that are not pruned; None if there are none.

        Raises HeaprError if it is not supported.
        """
        block = self.pruning.inner if self.pruning else self.quantization
        return BaseQuantization.from_config(block, str(self.path)) if block else None

    @cached_property
    def expert_quantization(self) -> BaseQuantization | None:
        """Format of the experts of an unpruned model; None if they are in the model's dtype, whatever the rest is."""
        weights = filter(self.is_pruned_expert, self.weight_map)
        return self.base_quantization if any(map(self.is_codes, weights)) else None

    @cached_property
    def kept_quantization(self) -> BaseQuantization | None:
        """`expert_quantization` for who keeps the codes. Raises HeaprError if experts are codes and others are not."""
        kept = self.expert_quantization
        if kept is not None and self.uncoded_experts:
            first = min(self.uncoded_experts, key=natural_order)
            raise HeaprError(
                f"{self.path}: {first} is {self.headers[first][0]} and other experts are codes, which cannot be kept "
                "side by side; store all of them alike with `heapr export --quantize int8` (or fp8, int4, none)"
            )
        return kept

    @cached_property
    def uncoded_experts(self) -> list[str]:
        """Names the weights of experts that are not stored as codes."""
        return [name for name in filter(self.is_pruned_expert, self.weight_map) if not self.is_codes(name)]

    @property
    def expert_scheme(self) -> ExpertScheme | None:
        """How the pruned experts of a compact checkpoint are stored; None in the model's dtype."""
        return self.pruning.expert_scheme if self.pruning and self.pruning.layout == "compact" else None

    def is_codes(self, name: str) -> bool:
        """Tells whether a weight is stored as codes."""
        return name in self.packed or self.scale_name(name) is not None

    def scale_name(self, name: str) -> str | None:
        """Returns the name of the scales of a weight; None if it is not stored as codes of 8 bits or our own of 4."""
        dtype = self.headers[name][0]
        if self.expert_scheme and self.is_pruned_expert(name) and dtype in (*STORED_DTYPES, STORED_PACKED_DTYPE):
            return name + SCALE_SUFFIX
        if dtype not in STORED_DTYPES:
            return None
        return name + self.base_quantization.scale_suffix if self.base_quantization else None

    def weight_of(self, name: str) -> str | None:
        """Returns the name of the weight whose scales `name` holds; None if it holds none."""
        for suffix in {SCALE_SUFFIX, self.base_quantization.scale_suffix if self.base_quantization else SCALE_SUFFIX}:
            weight = name.removesuffix(suffix)
            if weight != name and weight in self.weight_map and self.scale_name(weight) == name:
                return weight
        return None

    def check_unpruned(self) -> None:
        """Raises HeaprError if the checkpoint is pruned already, or quantized in a way that cannot be read."""
        if self.pruning:
            raise HeaprError(f"{self.path} is pruned already ({self.pruning.layout}); start from the base model")
        _ = self.base_quantization


def _by_shard(weight_map: dict[str, str]) -> dict[str, list[str]]:
    """Shard file name -> its tensor names, both sorted."""
    shards: dict[str, list[str]] = {}
    for name in sorted(weight_map):
        shards.setdefault(weight_map[name], []).append(name)
    return dict(sorted(shards.items()))
