# SPDX-License-Identifier: Apache-2.0
"""Tuned tile configurations: found by shape, by token count, by folder; defaults where there are none."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton import tuned_files
from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, Tile, TileConfig, default_config
from heapr_vllm.model_executor.kernels.triton.tuned_files import (
    choose_config,
    configs_up_to,
    profile_entry,
    token_entry,
)

SHAPE = LayerShape(2048, 8, 128, 576, 768, torch.bfloat16)
SMALL, LARGE = TileConfig(16, Tile(32, 128), Tile(64, 64)), TileConfig(128, Tile(128, 64), Tile(256, 64))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HEAPR_CONFIG_FOLDER, and a device called H200."""
    monkeypatch.setenv("HEAPR_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setattr(tuned_files, "device_name", lambda: "H200")
    tuned_files._tuned.cache_clear()
    tuned_files._announce.cache_clear()
    yield tmp_path
    tuned_files._tuned.cache_clear()


def write(folder: Path, **profiles: dict[str, TileConfig]) -> None:
    """`profiles`: "w576" to token count to tiles."""
    content = [
        {
            **profile_entry(replace(SHAPE, mean_width=int(name[1:]))),
            "tokens": {tokens: token_entry(config, 1.0) for tokens, config in configs.items()},
        }
        for name, configs in profiles.items()
    ]
    (folder / SHAPE.file_name("H200")).write_text(json.dumps({"format_version": 2, "profiles": content}))


def test_the_nearest_token_count_and_profile_win(folder: Path) -> None:
    write(folder, w768={"1": LARGE}, w576={"1": SMALL, "1024": LARGE})
    assert choose_config(SHAPE, 1) == choose_config(SHAPE, 30) == SMALL
    assert choose_config(SHAPE, 40) == choose_config(SHAPE, 9999) == LARGE
    assert choose_config(replace(SHAPE, mean_width=740), 1) == LARGE


@pytest.mark.parametrize(
    "other",
    [
        replace(SHAPE, mean_width=200),
        replace(SHAPE, num_experts=16),
        replace(SHAPE, hidden_size=4096),
        replace(SHAPE, top_k=4),
        replace(SHAPE, dtype=torch.float16),
        replace(SHAPE, scheme=ExpertScheme()),
    ],
    ids=["width", "experts", "hidden size", "top-k", "dtype", "codes"],
)
def test_other_shapes_get_defaults(folder: Path, other: LayerShape) -> None:
    write(folder, w576={"1": LARGE})
    assert choose_config(other, 1) == default_config(1, other)


def test_one_line_names_the_choice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO, logger="vllm.heapr_vllm"):
        for width in (500, 540, 576):
            choose_config(replace(SHAPE, mean_width=width), 8)
        assert len(caplog.messages) == 1 and "`heapr tune`" in caplog.messages[0]
        tuned_files._tuned.cache_clear()
        write(folder, w576={"1": LARGE})
        choose_config(SHAPE, 8)
    assert str(folder) in caplog.messages[1] and len(caplog.messages) == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        json.dumps({"profiles": 7}),
        json.dumps({"format_version": 1, "profiles": []}),
        json.dumps({"format_version": 2, "profiles": [profile_entry(SHAPE) | {"tokens": {"1": {"block_m": 16}}}]}),
    ],
)
def test_a_damaged_file_does_not_stop_serving(folder: Path, content: str) -> None:
    (folder / SHAPE.file_name("H200")).write_text(content)
    assert choose_config(SHAPE, 1) == default_config(1, SHAPE)


def test_entries_of_older_files_are_read() -> None:
    entry = token_entry(SMALL, 1.0)
    del entry["decode"]
    assert TileConfig.from_dict(entry) == SMALL


def test_batch_invariance_pins_one_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, w576={"1": SMALL, "1024": LARGE})
    assert len({choose_config(SHAPE, tokens) for tokens in (1, 64, 1024, 8192)}) == 2
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (pinned,) = {choose_config(SHAPE, tokens) for tokens in (1, 64, 1024, 8192)}
    assert pinned.one_route is False
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert choose_config(SHAPE, 1) == SMALL


def test_all_configurations_of_a_batch_size_are_found() -> None:
    found = configs_up_to(SHAPE, 8192)
    assert len(found) == 6 and set(found) == {default_config(tokens, SHAPE) for tokens in range(1, 8193)}
    assert configs_up_to(SHAPE, 1) == [default_config(1, SHAPE)]


def test_tuned_blocks_of_one_route_are_for_few_routes(folder: Path) -> None:
    write(folder, w576={"4": replace(SMALL, one_route=True)})
    assert [choose_config(SHAPE, tokens).one_route for tokens in (1, 16, 17, 100)] == [True, True, False, False]
