# SPDX-License-Identifier: Apache-2.0
"""Commands on what nobody should give them: one line, the right exit code, inputs untouched, nothing run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heapr_vllm.cli import prune as prune_command
from heapr_vllm.cli.main import main
from heapr_vllm.formats.checkpoint import INDEX_FILE
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(argv: list[str], message: str, capsys: pytest.CaptureFixture, *inputs: Path) -> None:
    """Exit code 2 and one line that says `message`; no input has changed."""
    before = [contents(folder) for folder in inputs]
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("heapr: ")]
    assert message in line
    assert [contents(folder) for folder in inputs] == before


@pytest.fixture
def masks(masks_repository: Path, tmp_path: Path) -> Path:
    shutil.copytree(masks_repository, tmp_path / "parent" / "masks")
    return tmp_path / "parent" / "masks"


def test_outputs_over_inputs(masks: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calib = tmp_path / "calib"
    shutil.copytree(calibration, calib)
    message = "which is an input; choose another --output"
    prune = ["prune", str(calib), "--sparsity", "0.5", "--overwrite", "-o"]
    for output in (calib, tmp_path, calib / "masks"):
        refused([*prune, str(output)], message, capsys, tmp_path)
    for output in (masks, masks.parent, masks / "sub"):
        refused(["export", str(masks), "--overwrite", "-o", str(output)], message, capsys, tmp_path)
    (tmp_path / "link").symlink_to(masks)
    refused(["export", str(masks), "--overwrite", "-o", str(tmp_path / "link")], message, capsys, tmp_path)


def test_a_calibration_does_not_mix_with_another_folder(
    masks: Path, qwen3: Path, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    calibrate = ["calibrate", str(qwen3), "--dataset", str(corpus), "--overwrite", "-o", str(masks)]
    refused(calibrate, "is a masks repository, which a calibration does not replace", capsys, masks)


def test_code_of_a_checkpoint_is_never_run(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """Not even if somebody says yes on standard input, where transformers would ask."""
    base, trace = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(qwen3, base)
    (base / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    command = [
        "calibrate",
        str(base),
        "--dataset",
        str(corpus),
        "--max-seq-length",
        "64",
        "-o",
        str(tmp_path / "calib"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "heapr_vllm", *command],
        input="yes\n" * 5,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("heapr: ")
    )
    assert not trace.exists() and not (tmp_path / "calib").exists()


def test_weights_that_are_missing(qwen3: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """transformers would fill them at random."""
    base = tmp_path / "base"
    shutil.copytree(qwen3, base)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    text = ["--dataset", str(corpus), "--max-seq-length", "64"]
    message = "lacks model.norm.weight"
    refused(
        ["calibrate", str(base), *text, "--num-calibration-samples", "2", "-o", str(tmp_path / "c")],
        message,
        capsys,
        base,
    )
    refused(["eval", str(base), *text, "--num-samples", "2"], message, capsys, base)


def test_a_compact_checkpoint_without_a_weight(
    masks: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export_checkpoint(masks, tmp_path / "compact")
    tensors = load_file(tmp_path / "compact" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "compact" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "compact" / INDEX_FILE).unlink()
    evaluate = [
        "eval",
        str(tmp_path / "compact"),
        "--dataset",
        str(corpus),
        "--max-seq-length",
        "64",
        "--num-samples",
        "2",
    ]
    refused(evaluate, "lacks model.norm.weight", capsys, tmp_path / "compact")


def test_one_token_predicts_nothing(qwen3: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["calibrate", str(qwen3), "--dataset", str(corpus), "--max-seq-length", "1", "-o", str(tmp_path / "c")]
    refused(command, "--max-seq-length 1 leaves nothing to predict", capsys, qwen3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0] * 8, [0] * 8, [0] * 8], "no expert got a calibration token"),
        ([[-1] * 8, [1] * 8, [1] * 8], "calibration.json is damaged (Expected `int` >= 0"),
        ([[1] * 3, [1] * 8, [1] * 8], "counts the tokens of other experts than the masks have"),
    ],
)
def test_absurd_token_counts(tokens: list, message: str, masks: Path, capsys: pytest.CaptureFixture) -> None:
    path = masks / "heapr" / CALIBRATION_FILE
    record = json.loads(path.read_text())
    record["tokens"] = dict(zip(sorted(record["tokens"]), tokens, strict=True))
    path.write_text(json.dumps(record))
    refused(["inspect", str(masks)], message, capsys, masks)


def test_masks_are_those_that_config_json_names(masks: Path, capsys: pytest.CaptureFixture) -> None:
    """One reader for all commands: it follows `masks`, and believes only what has the sha256."""
    (masks / "heapr" / "masks.safetensors").rename(masks / "other.safetensors")
    config = json.loads((masks / "config.json").read_text())
    config["quantization_config"]["masks"] = "other.safetensors"
    (masks / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(masks)]) == 0
    config["quantization_config"]["masks_sha256"] = "0" * 64
    (masks / "config.json").write_text(json.dumps(config))
    for command in (["inspect", str(masks)], ["export", str(masks), "-o", str(masks.parent / "out")]):
        refused(command, "differs from the masks_sha256 in config.json", capsys, masks)


def test_the_last_resort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What nobody thought of is one line too, and --debug shows where it is."""

    def broken(args: object) -> None:
        raise ZeroDivisionError("nobody thought of it\nand a second line")

    monkeypatch.setattr(prune_command, "run_inspect", broken)
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "heapr: unexpected ZeroDivisionError: nobody thought of it. Please report it, with the output of `heapr env` "
        "and of the same command with HEAPR_DEBUG=1\n"
    )
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(tmp_path), "--debug"])
    monkeypatch.setenv("HEAPR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(tmp_path)])


@pytest.mark.parametrize("option", ["--seed", "--min-width", "--align"])
def test_numbers_beyond_64_bits(option: str, calibration: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["prune", str(calibration), "--sparsity", "0.5", option, str(2**63), "-o", "out"])
    assert exit_.value.code == 2 and "does not fit into 64 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "asks for several processes, and MASTER_ADDR is unset; start them with torchrun"),
        ({"WORLD_SIZE": "many", "MASTER_ADDR": "127.0.0.1"}, "several processes, and WORLD_SIZE is 'many'"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"},
            "or MASTER_PORT 70000 is none",
        ),
    ],
)
def test_half_of_torchruns_variables(
    variables: dict, message: str, monkeypatch: pytest.MonkeyPatch, qwen3: Path, corpus: Path, capsys
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(["calibrate", str(qwen3), "--dataset", str(corpus), "-o", "out"], message, capsys, qwen3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.long
def test_a_stopped_command_leaves_nothing(number: signal.Signals, masks: Path, tmp_path: Path) -> None:
    """In the middle of an export, at a moment of its own for every signal."""
    script = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs ignore it
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup does
        "from heapr_vllm.prune.export import shards; real = shards.save_file\n"
        "def slow(*a, **k): real(*a, **k); print('writing', flush=True); time.sleep(60)\n"
        "shards.save_file = slow; from heapr_vllm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "export", str(masks), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_a_signal_that_a_library_makes_another_error_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def importing(args: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("could not import a module") from error

    monkeypatch.setattr(prune_command, "run_inspect", importing)
    assert main(["inspect", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "heapr: terminated\n"


def test_masks_serve_with_the_bases_sampling(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    """generation_config.json comes along to the masks and to what is exported."""
    base = tmp_path / "base"
    shutil.copytree(qwen3, base)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 256}))
    text = ["--dataset", str(corpus), "--num-calibration-samples", "2", "--max-seq-length", "64"]
    assert main(["calibrate", str(base), *text, "-o", str(tmp_path / "calib")]) == 0
    assert main(["prune", str(tmp_path / "calib"), "--sparsity", "0.5", "-o", str(tmp_path / "masks")]) == 0
    found = json.loads((tmp_path / "masks" / "generation_config.json").read_text())
    assert found == {"temperature": 0.5, "eos_token_id": 256}


def test_weights_are_readable_by_others(masks: Path, tmp_path: Path) -> None:
    export_checkpoint(masks, tmp_path / "compact")
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "compact").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "compact" / "config.json").stat().st_mode & 0o077} and modes != {0}


def test_null_is_no_quantization(qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen3, base)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": None}
    (base / "config.json").write_text(json.dumps(config))
    text = ["--dataset", str(corpus), "--num-calibration-samples", "2", "--max-seq-length", "64"]
    assert main(["calibrate", str(base), *text, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "OUT: No space left on device; free some space there"),
        (SafetensorError("I/O error: (os error 28)"), "OUT: No space left on device; free some space there"),
        (OSError(30, "Read-only file system", "OUT/a"), "OUT/a: Read-only file system; choose another place"),
        (OSError(28, "No space", "base/a", None, "OUT/b"), "OUT/b: No space left on device; free some space there"),
        (
            PermissionError(13, "Permission denied", "/base/a"),
            "PermissionError: [Errno 13] Permission denied: '/base/a'",
        ),
    ],
)
def test_what_the_system_refuses(
    error: Exception, message: str, masks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Real disks: tests/tools/test_interrupt.py."""

    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.chdir(masks.parent)
    monkeypatch.setattr("heapr_vllm.prune.export.shards.save_file", full)
    refused(["export", str(masks), "-o", "OUT"], message, capsys, masks)
    assert sorted(path.name for path in Path().iterdir()) == ["masks"]
