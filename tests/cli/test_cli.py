# SPDX-License-Identifier: Apache-2.0
"""The `heapr` command: the whole path, and one-line errors with exit code 2 that leave nothing behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from heapr_vllm.cli.main import main
from heapr_vllm.formats.masks import NeuronMasks


def test_whole_path(qwen3: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calib, masks, compact = (str(tmp_path / name) for name in ("calib", "masks", "compact"))
    assert (
        main(
            [
                "calibrate",
                str(qwen3),
                "--dataset",
                str(corpus),
                "-o",
                calib,
                "--num-calibration-samples",
                "4",
                "--max-seq-length",
                "64",
            ]
        )
        == 0
    )
    assert main(["prune", calib, "--sparsity", "0.5", "-o", masks]) == 0
    assert "stored -50.0% | executed FLOPs -" in capsys.readouterr().out
    assert main(["export", masks, "-o", compact]) == 0
    capsys.readouterr()
    assert main(["inspect", compact, "--json", "--plot", str(tmp_path / "widths.png")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kept"] == 768 and summary["neurons"] == 1536
    assert 0 < summary["executed_reduction"] < 1
    assert all(width % 16 == 0 for widths in summary["widths"].values() for width in widths)
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "budget", [["--flops", "0.3"], ["--target-size", "700KiB"], ["--target-size", "800KB", "--flops", "0.2"]]
)
def test_budgets_in_bytes_and_flops(budget: list[str], calibration: Path, tmp_path: Path, capsys) -> None:
    masks, compact = str(tmp_path / "masks"), str(tmp_path / "compact")
    assert main(["prune", str(calibration), *budget, "--criterion", "fisher", "-o", masks]) == 0
    report = capsys.readouterr().out
    assert "stored -" in report and "executed FLOPs -" in report and "super experts found and protected: 0" in report
    assert "x routing frequency +" in report and "predicted loss increase" in report
    assert main(["export", masks, "-o", compact]) == 0
    capsys.readouterr()
    assert main(["inspect", compact, "--json", "--plot", str(tmp_path / "report.png")]) == 0
    summary = json.loads(capsys.readouterr().out)
    total = json.loads((tmp_path / "compact" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert summary["compact_bytes"] == total
    if "--flops" in budget:
        assert summary["executed_reduction"] >= float(budget[-1])
    if "--target-size" in budget:
        size = {"700KiB": 700 * 1024, "800KB": 800_000}[budget[1]]
        assert total <= size and ("--flops" in budget or size - total < 16 * 3 * 64 * 4)
    assert summary["frontier"]["chosen"]["stored_reduction"] == pytest.approx(summary["stored_reduction"])
    assert summary["frontier"]["chosen"]["executed_reduction"] == pytest.approx(summary["executed_reduction"])


def test_sweep(calibration: Path, tmp_path: Path, capsys) -> None:
    argv = ["sweep", str(calibration), "--criterion", "heapr", "fisher", "--ratios", "0.2", "0.4"]
    assert main([*argv, "--json", "--plot", str(tmp_path / "sweep.png")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main(argv) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ([], "no budget is given"),
        (["--target-size", "1KiB"], "are not routed experts, and --min-width, --protect and experts without a calib"),
        (["--target-size", "1TB"], "is no smaller than the checkpoint"),
        (["--flops", "0.9", "--min-width", "32"], "flops 0.9 is out of reach"),
        (["--sparsity", "0.5", "--flops", "1.2"], "flops 1.2 is not between 0 and 1"),
        (["--sparsity", "0.5", "--criterion", "luck"], "is not one of heapr, fisher"),
    ],
)
def test_impossible_budgets(budget: list[str], message: str, calibration: Path, tmp_path: Path, capsys) -> None:
    fails(["prune", str(calibration), *budget, "-o", str(tmp_path / "m")], message, capsys, tmp_path)


@pytest.mark.parametrize(("option", "value"), [("--target-size", "1KiB"), ("--flops", "0.95"), ("--sparsity", "0.9")])
def test_the_nearest_reachable_value_is_reachable(
    option: str, value: str, calibration: Path, tmp_path: Path, capsys
) -> None:
    prune = ["prune", str(calibration), "--min-width", "13", "-o", str(tmp_path / "m"), option]
    assert main([*prune, value]) == 2
    nearest = re.search(r"the nearest is ([\d.]+( [KM]iB)?)", capsys.readouterr().err)[1]
    assert main([*prune, nearest.replace(" ", "")]) == 0


@pytest.mark.parametrize("budget", [["--sparsity", "0.5", "--target-size", "1MB"], ["--target-size", "much"]])
def test_budgets_that_argparse_refuses(budget: list[str], calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["prune", str(calibration), *budget, "-o", str(tmp_path / "m")])
    assert exit_info.value.code == 2 and not (tmp_path / "m").exists()


def test_env_is_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["env"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] and report["supported_vllm"] and isinstance(report["plugin_discovered"], bool)


def fails(argv: list[str], message: str, capsys: pytest.CaptureFixture, folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*"))
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("heapr: error: ") and message in error
    assert sorted(path for path in folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.5", "25"])
def test_sparsity_outside_range(sparsity: str, calibration: Path, tmp_path: Path, capsys) -> None:
    fails(
        ["prune", str(calibration), "--sparsity", sparsity, "-o", str(tmp_path / "m")],
        "not between 0 and 1",
        capsys,
        tmp_path,
    )


def test_existing_output(calibration: Path, qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    output = ["-o", str(tmp_path / "taken")]
    calibrate = ["calibrate", str(qwen3), "--dataset", str(corpus), *output]
    for argv in (["prune", str(calibration), "--sparsity", "0.5", *output], calibrate):
        fails(argv, "already exists; pass --overwrite", capsys, tmp_path)
        fails([*argv, "--overwrite"], "was not written by heapr", capsys, tmp_path)


def test_overwrite_replaces_own_output(calibration: Path, tmp_path: Path) -> None:
    for sparsity in ("0.25", "0.5"):
        assert main(["prune", str(calibration), "--sparsity", sparsity, "-o", str(tmp_path / "m"), "--overwrite"]) == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["sparsity"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_dense_model(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(qwen3, tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".experts." not in name},
        tmp_path / "dense" / "model.safetensors",
    )
    fails(
        ["calibrate", str(tmp_path / "dense"), "--dataset", str(corpus), "-o", str(tmp_path / "c")],
        "has no routed experts",
        capsys,
        tmp_path,
    )


def test_damaged_base_model(qwen3: Path, masks_repository: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(qwen3, tmp_path / "cut")
    data = (qwen3 / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(
        ["export", str(masks_repository), "--model", str(tmp_path / "cut"), "-o", str(tmp_path / "out")],
        "is damaged",
        capsys,
        tmp_path,
    )


def test_damaged_masks(masks_repository: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(masks_repository, tmp_path / "masks")
    path = tmp_path / "masks" / "heapr" / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    fails(["export", str(tmp_path / "masks"), "-o", str(tmp_path / "out")], "is damaged", capsys, tmp_path)


def test_nan_weights(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(qwen3, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert (
        main(
            [
                "calibrate",
                str(tmp_path / "nan"),
                "--dataset",
                str(corpus),
                "-o",
                str(tmp_path / "c"),
                "--num-calibration-samples",
                "2",
                "--max-seq-length",
                "64",
            ]
        )
        == 2
    )
    assert "the loss is nan at sample 0; try --dtype float32" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "nowhere"], "nowhere holds no heapr/masks.safetensors; create it with `heapr prune`"),
        (["export", "nowhere", "-o", "out"], "nowhere is not a masks repository"),
        (["prune", "nowhere", "--sparsity", "0.5", "-o", "out"], "nowhere/moments.safetensors does not exist"),
        (["calibrate", "nowhere", "--dataset", "x.txt", "-o", "out"], "nowhere is neither a local directory nor"),
    ],
)
def test_missing_input(argv: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    fails(argv, message, capsys, tmp_path)


def test_export_never_replaces_its_input(masks_repository: Path, qwen3: Path, tmp_path: Path, capsys) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen3, base)
    export = ["export", str(masks_repository), "--model", str(base), "-o", str(base), "--overwrite"]
    fails(export, "which is an input", capsys, tmp_path)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "model.safetensors.index.json").write_text("{}")
    fails([*export[:5], str(sharded), "--overwrite"], "was not written by heapr", capsys, tmp_path)


def test_masks_with_two_flipped_bits(masks_repository: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(masks_repository, tmp_path / "masks")
    masks = NeuronMasks.from_pretrained(masks_repository)
    masks.keep["model.layers.0.mlp.experts"][5, :2] ^= True
    masks.save_pretrained(tmp_path / "masks")
    fails(
        ["export", str(tmp_path / "masks"), "-o", str(tmp_path / "out")],
        "differs from the masks_sha256",
        capsys,
        tmp_path,
    )


def test_resume_does_not_write_into_other_folders(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    fails(
        ["calibrate", str(qwen3), "--dataset", str(corpus), "-o", str(tmp_path / "other"), "--resume"],
        "already exists",
        capsys,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "sees 0 GPUs; use --device cpu"),
        ("cuda:9", "sees 0 GPUs"),
        ("gpu", "is not cpu, cuda or cuda:N"),
        ("meta", "is not cpu, cuda or cuda:N"),
    ],
)
def test_device_that_is_not_there(
    device: str, message: str, qwen3: Path, corpus: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    fails(
        ["calibrate", str(qwen3), "--dataset", str(corpus), "-o", str(tmp_path / "c"), "--device", device],
        message,
        capsys,
        tmp_path,
    )


def test_dry_run_needs_no_output(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    assert main(["calibrate", str(qwen3), "--dataset", str(corpus), "--dry-run"]) == 0
    fails(["calibrate", str(qwen3), "--dataset", str(corpus)], "with -o CALIB", capsys, tmp_path)


def test_pictures_have_a_known_format(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "masks", "--plot", "widths.xyz"])
    assert "is not a .png" in capsys.readouterr().err


def test_broken_config_json(qwen3: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(qwen3, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{")
    fails(
        ["calibrate", str(tmp_path / "base"), "--dataset", str(corpus), "-o", str(tmp_path / "c")],
        "config.json is damaged (Input data was truncated); download the checkpoint again",
        capsys,
        tmp_path,
    )


def test_a_note_where_speed_falls_behind(tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture) -> None:
    """A sum over tokens calls the neurons of rarely used experts the least salient: they go, and cost no time."""
    prune = ["prune", str(calibration), "--criterion", "fisher", "--unrouted", "prune", "-o"]
    assert main([*prune, str(tmp_path / "stored"), "--sparsity", "0.3"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "speed follows executed FLOPs" in note and note.endswith("--flops R with --criterion fisher")
    assert main([*prune, str(tmp_path / "executed"), "--flops", "0.3"]) == 0
    assert "note: " not in capsys.readouterr().out


def test_no_bars_where_stderr_is_no_terminal(masks_repository: Path, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """Neither ours nor those of other libraries, such as the "Loading weights" of transformers."""
    command = [sys.executable, "-m", "heapr_vllm", "eval", str(masks_repository), "--dataset", str(corpus)]
    command += ["--num-samples", "2", "--max-seq-length", "64"]
    piped = subprocess.run(command, capture_output=True, text=True)
    assert piped.returncode == 0 and "perplexity" in piped.stdout
    assert "it/s" not in piped.stderr and "%|" not in piped.stderr and "Loading weights" not in piped.stderr


def test_help_is_light() -> None:
    """`heapr --help` answers at once: it imports neither torch nor transformers nor vLLM."""
    code = (
        "import sys; from heapr_vllm.cli.main import build_parser; build_parser().format_help(); "
        "print({'torch', 'transformers', 'vllm', 'numpy'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
