"""The command line as scripts use it: exit statuses, messages, JSON, signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import config_file, records

from emo_jax import cli
from emo_jax.checkpoints import checkpoint
from emo_jax.commands.arguments import take_overrides


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(config_file(tmp_path_factory.mktemp("config")))


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **kwargs)


def test_help_is_immediate_and_config_errors_need_no_jax(config):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "emo_jax", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert result.returncode == 0 and "train" in result.stdout
    assert min(times) < 0.5
    code = (f"import sys; from emo_jax.cli import main; status = main(['train', {config!r}, '--out', '/nowhere/x', "
            f"'--model.top_k=99']); sys.exit(status + 10 * any(m in sys.modules for m in ('jax', 'numpy', 'grain')))")
    assert python(code).returncode == 2


def fails(capfd, status, *argv):
    assert cli.main(list(argv)) == status
    return capfd.readouterr().err


def test_every_command_has_examples_that_parse():
    for command in cli.COMMANDS:
        assert command.examples, command.name
        for example in command.examples:
            if example.startswith("emo-jax "):
                argv, overrides = take_overrides(shlex.split(example)[1:])
                assert cli.parser().parse_args(argv).command is command, example
                assert not overrides or command.overrides, example


@pytest.mark.parametrize("argv, message", [
    (["trian"], "did you mean train?"), (["subset", "mrege"], "did you mean merge?"),
    (["select", "x", "--keep", "3", "--out", "y", "--example", "z", "--method", "routr"], "did you mean router?"),
    (["generate", "x", "--prompt", "y", "--batch-size", "0"], "--batch-size: '0' must be an integer of 1 or more"),
    (["generate", "x", "--prompt", "y", "--seed", "1e20"], "--seed: invalid int value: '1e20'"),
    (["generate", "x", "--prompt", "\udcff"], "--prompt: '\\udcff' is not UTF-8 text"),
    (["select", "x", "--keep", "3", "--out", "y", "--calibration", "z", "--documents", "-2"], "--documents: '-2' must be"),
])
def test_wrong_usage_says_what_was_meant_or_is_allowed(argv, message, capfd):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2 and message in capfd.readouterr().err


def test_folders_that_cannot_be_written_are_refused(config, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    for out, message in (("", "--out is empty"), (str(file), "is a file; expected a folder"), (str(file / "x"), "--out"),
                         ("/proc/x/y", "cannot be written"), ("o" * 5000, "File name too long")):
        assert message in fails(capfd, 2, "train", config, "--out", out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for content, name in (("[]", "config.json"), ("{}", "config.json"), (None, "config.json"), ("", "checkpoints")):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        (out / name).mkdir() if content is None else (out / name).write_text(content)
        assert str(out / name) in fails(capfd, 2, "train", config, "--out", str(out))


def test_wrong_configs_name_the_field_and_both_values(config, tmp_path, capfd):
    out = str(tmp_path / "out")

    def message(*overrides):
        return fails(capfd, 2, "train", config, "--out", out, *overrides)

    assert "did you mean train.steps" in message("--train.step=5")
    assert "train.steps='many' must be an integer" in message("--train.steps", "many")
    assert "model.top_k=9 must be more than model.num_shared_experts=1 and at most model.num_experts=8" \
        in message("--model.top_k=9")
    assert "does not divide the 8 devices" in message("--mesh.data=3")
    assert "must divide train.batch_size / train.microbatches=12" in message("--train.batch_size=12")
    assert "no config 'emo_nothing'" in fails(capfd, 2, "train", "emo_nothing", "--out", out)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as e:
        cli.main(["train", config])
    assert e.value.code == 2 and "--out" in capfd.readouterr().err


def test_wrong_documents_name_file_and_line(config, tmp_path, capfd):
    def message(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return fails(capfd, 2, "train", config, "--out", str(tmp_path / "out"), f"--data.path={path}")

    assert "empty.jsonl" in message("empty.jsonl", b"")
    text = message("broken.jsonl", b'{"text": "fine"}\n{"text": "not fi\n')
    assert "broken.jsonl" in text and "2" in text
    text = message("lacks.jsonl", b'{"text": "fine"}\n{"body": "no text"}\n')
    assert "lacks.jsonl" in text and "2" in text and "text" in text
    assert "binary.txt" in message("binary.txt", bytes(range(256)) * 8)
    assert "no such file" in fails(capfd, 2, "train", config, "--out", str(tmp_path / "out"), "--data.path=/not/there")


def test_json_errors_and_missing_checkpoints(config, tmp_path, capfd):
    assert cli.main(["eval", str(tmp_path), "--json"]) == 2
    captured = capfd.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["exit_status"] == 2 and "expected a run folder" in result["error"] and result["error"] in captured.err


def test_config_prints_what_was_changed(config, capfd):
    assert cli.main(["config", config, "--train.steps=7", "--seed=3", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["config"]["train"]["steps"] == 7 and result["config"]["seed"] == 3
    assert result["difference"]["train.steps"] == {"default": 238419, "value": 7}
    assert "seed" in result["difference"] and "model.rope_theta" not in result["difference"]


def test_sigterm_saves_and_asks_to_be_started_again_and_the_checkpoint_can_be_evaluated(config, tmp_path):
    out = tmp_path / "run"
    env = os.environ | {"XLA_FLAGS": ""}  # one device
    process = subprocess.Popen(
        [sys.executable, "-m", "emo_jax", "train", config, "--out", str(out), "--json", "--train.steps=1000000",
         "--data.workers", "2"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or len(records(out)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["stopped"] == "SIGTERM" and result["step"] >= 3
    assert checkpoint.steps(out / "checkpoints") == [result["step"]] == [records(out)[-1]["step"]]
    assert "step 2/1000000" in stderr
    for choice in ("attention: blocked", "grouped matmul: blocked", "MoE dispatch: local"):
        assert stderr.count(choice) == 1
    evaluated = subprocess.run([sys.executable, "-m", "emo_jax", "eval", str(out), "--json"], env=env,
                               capture_output=True, text=True, timeout=120)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert set(result["labels"]) == {"color", "count"} and 0 < result["loss"] < 7
