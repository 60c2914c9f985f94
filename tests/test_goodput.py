"""Where a run's wall time goes: time.jsonl, and what `emo-jax goodput` makes of it."""

import json
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import config_file, records, series, tiny_config

from emo_jax.checkpoints import checkpoint
from emo_jax.errors import InputError
from emo_jax.train import goodput, loop
from emo_jax.train.goodput import CAUSES, Clock, account
from emo_jax.train.metrics import JsonLines


def record(first, last, began, ended, done=False, **seconds):
    seconds = {goodput.STEPS: ended - began - sum(seconds.values())} | seconds
    return {"from": first, "step": last, "began": began, "ended": ended, "seconds": seconds} | ({"done": True} if done else {})


def spent(*found):
    """What is not 0; it must add up to the time from the first begin to the last end."""
    seconds = account(list(found))
    assert sum(seconds.values()) == pytest.approx(found[-1]["ended"] - found[0]["began"]) and seconds.keys() == CAUSES.keys()
    return {cause: round(s, 6) for cause, s in seconds.items() if s}


def test_time_between_starts_and_steps_that_are_repeated_are_lost():
    first = record(0, 10, 0.0, 30.0, compile=5.0), record(10, 20, 30.0, 50.0, save=4.0), record(20, 28, 50.0, 66.0)
    assert spent(*first) == {"steps": 57.0, "compile": 5.0, "save": 4.0}
    again = record(20, 30, 100.0, 130.0, startup=3.0, restore=2.0)  # from the checkpoint of step 20
    assert spent(*first, again) == {"steps": 41.0 + 25.0, "compile": 5.0, "save": 4.0, "startup": 3.0, "restore": 2.0,
                                    "restart": 34.0, "repeated": 16.0}
    # Back to within a record, and then to before it: what is lost is lost once.
    assert spent(*first, record(24, 25, 66.0, 67.0), record(15, 16, 67.0, 69.0)) == {
        "steps": 25.0 + 8.0 + 2.0, "compile": 5.0, "save": 4.0, "repeated": 8.0 + 16.0 + 1.0}


def test_a_pause_before_a_finished_run_is_given_more_steps_is_no_loss():
    seconds = account([record(0, 10, 0.0, 30.0, done=True), record(10, 12, 1000.0, 1010.0, startup=4.0)])
    assert (seconds["restart"], seconds["steps"], sum(seconds.values())) == (0.0, 36.0, 40.0)


def test_every_second_of_a_clock_has_one_cause():
    began = time.time()
    clock = Clock(began - 5.0)
    clock.goes_on_after(3)
    for cause in (goodput.STARTUP, goodput.STEPS, goodput.SAVE, goodput.STEPS):
        time.sleep(0.01)
        clock.lap(cause)
    found = clock.record(7)
    assert (found["from"], found["step"], found["start"]) == (3, 7, True) and found["began"] == pytest.approx(began - 5.0)
    assert sum(found["seconds"].values()) == pytest.approx(found["ended"] - found["began"], abs=1e-3)
    assert set(found["seconds"]) == {"startup", "steps", "save"} and found["seconds"]["startup"] > 5.0
    following = clock.record(7)
    assert following["began"] == found["ended"] and "start" not in following and not following["seconds"]


def test_what_is_no_record_is_left_out_and_what_was_written_stays(tmp_path):
    good = record(0, 1, 0.0, 1.0)
    lines = [json.dumps(good), "note", "[1]", '{"from": 0, "step": 1}', json.dumps(good | {"seconds": {"sleep": 1.0}}),
             json.dumps(good | {"ended": "x"}), json.dumps(good | {"began": float("inf")}), json.dumps(good)[:30]]
    (tmp_path / "time.jsonl").write_text("\n".join(lines))
    assert goodput.read(tmp_path / "time.jsonl") == [good]
    file = JsonLines(tmp_path / "time.jsonl", goodput.read(tmp_path / "time.jsonl"))
    file.write(record(1, 2, 1.0, 2.0))
    file.close()
    assert goodput.read(tmp_path / "time.jsonl") == [good, record(1, 2, 1.0, 2.0)]
    with pytest.raises(InputError, match="has no time.jsonl with a record"):
        goodput.goodput(str(tmp_path / "other"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(a run that was killed after steps that it had not saved, and went on to its end; the time before its first start; the
    last step before the kill, and the one it went on from)"""
    folder = tmp_path_factory.mktemp("killed")
    out, began = folder / "run", time.time()
    command = [sys.executable, "-m", "emo_jax", "train", str(config_file(folder)), "--out", str(out), "--json",
               "--checkpoint.every=20", "--train.eval_every=30"]
    with subprocess.Popen([*command, "--train.steps=1000000"], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (saved := checkpoint.steps(out / "checkpoints")) and records(out)[-1]["step"] >= saved[-1] + 3:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    last = goodput.read(out / "time.jsonl")[-1]["step"]
    time.sleep(1.5)
    done = subprocess.run([*command, f"--train.steps={last + 15}"], check=True, capture_output=True, text=True)
    return out, began, last, json.loads(done.stdout.splitlines()[-1])["resumed_from"]


def test_the_parts_of_a_run_that_was_killed_and_went_on_add_up_to_the_clock(killed, capsys):
    from emo_jax import cli

    out, began, last, _ = killed
    assert cli.main(["goodput", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ended = (out / "time.jsonl").stat().st_mtime
    assert found["wall_seconds"] == pytest.approx(ended - began, abs=1.0) == sum(found["seconds"].values())
    assert (found["starts"], found["from"], found["step"]) == (2, 0, last + 15)
    assert found["seconds"]["restart"] > 1.5 and all(s >= 0 for s in found["seconds"].values())
    for cause in ("steps", "startup", "compile", "restore", "save", "evaluation", "repeated"):
        assert found["seconds"][cause] > 0, cause
    assert found["goodput"] == pytest.approx(found["seconds"]["steps"] / found["wall_seconds"])
    assert [step for step, _ in series(out)] == list(range(1, last + 16))  # metrics.jsonl knows nothing of this

    assert cli.main(["goodput", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"went into steps 1 to {last + 15} (2 starts)" in text and CAUSES["repeated"] in text and "wall time" in text


def test_the_steps_that_the_kill_undid_are_those_that_are_repeated(killed):
    out, _, _, resumed_from = killed
    before = goodput.read(out / "time.jsonl")
    first = before[:next(i for i, r in enumerate(before) if i and "start" in r)]
    undone = sum(r["seconds"].get("steps", 0.0) for r in first if r["step"] > resumed_from)
    assert undone > 0 and account(before)["repeated"] == pytest.approx(undone)
    assert account(first)["repeated"] == 0


def test_a_file_in_its_place_or_foreign_lines_change_no_number(tmp_path):
    loop.train(tiny_config(tmp_path, "--train.steps=4"), tmp_path / "run")
    times = tmp_path / "run" / "time.jsonl"
    first = goodput.read(times)
    assert first[-1]["done"] and first[-1]["step"] == 4
    times.write_bytes(times.read_bytes() + b"note\n\xff\n" + b'{"from": 4, "st')
    loop.train(tiny_config(tmp_path, "--train.steps=6"), tmp_path / "run")
    assert goodput.read(times)[:len(first)] == first and goodput.read(times)[-1]["step"] == 6
    times.unlink()
    times.mkdir()
    loop.train(tiny_config(tmp_path, "--train.steps=8"), tmp_path / "run")
    assert goodput.read(times)[0]["from"] == 6 and (tmp_path / "run" / "damaged" / "time.jsonl").is_dir()
    assert [step for step, _ in series(tmp_path / "run")] == list(range(1, 9))
