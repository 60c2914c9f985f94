"""Bad steps are skipped bit for bit and counted; too many in a row lead back to a checkpoint, and their rows are left out."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny_run import records, series, tiny_config
from two_processes import finish, start_command

from emo_jax import cli, sharding
from emo_jax.checkpoints import checkpoint
from emo_jax.config import FaultsConfig
from emo_jax.errors import RestartError, RunError
from emo_jax.train import bad_steps, loop, rollback
from emo_jax.train.goodput import goodput
from emo_jax.train.loop import train
from emo_jax.train.step import init_state, make_train_step

CHEAP = ("mesh.data=8", "mesh.fsdp=1", "data.eval_fraction=0.0")


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.tobytes() == y.tobytes()


def without_schedule(opt_state):
    """The optimizer's state without the steps of the run that its schedule counts."""
    counter = lambda part: isinstance(part, optax.ScaleByScheduleState)
    return jax.tree.map(lambda part: None if counter(part) else part, opt_state, is_leaf=counter)


@pytest.mark.parametrize("microbatches, mesh", [(1, dict(data=2, fsdp=2, expert=2)), (2, dict(fsdp=1))])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(microbatches, mesh):
    """And the next one is the step that would have been taken in its place, at the rate of its own number."""
    config = tiny.config(mesh=mesh, train=dict(microbatches=microbatches))
    on = sharding.make_mesh(config, jax.devices()[:np.prod(list(mesh.values()))])
    step = make_train_step(config, on)
    good, other = (tiny.batch(config, seed) for seed in (0, 1))
    bad = good | {"loss_weights": np.where(np.arange(32) == 7, np.nan, good["loss_weights"]).astype(np.float32)}
    state, _ = step(init_state(config, on), sharding.global_batch(on, good))
    before = host(state)
    state, metrics = step(state, sharding.global_batch(on, bad))
    after, verdict = host(state), bad_steps.Verdict(*metrics["verdict"].tolist())
    assert math.isnan(metrics["loss"]) and (verdict.skipped, verdict.skipped_in_a_row) == (1, 1)
    assert (before.step, after.step, after.recent.count) == (1, 2, 1)
    assert_same_bits((before.params, without_schedule(before.opt_state)), (after.params, without_schedule(after.opt_state)))
    again = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), before._replace(step=after.step), state)
    taken, _ = step(state, sharding.global_batch(on, other))
    straight, _ = step(again, sharding.global_batch(on, other))
    assert_same_bits(host((taken.params, without_schedule(taken.opt_state))),
                     host((straight.params, without_schedule(straight.opt_state))))
    assert host(taken.recent).skipped == 0


def published(losses, norms, sigma=6.0, window=128):
    """Which steps the published rule takes: `get_step_factor` of SkipStepOptimizer, for finite values."""
    for i in range(len(losses)):
        if i + 1 < window // 2:
            yield True
            continue
        checks = []
        for values in (losses, norms):
            before = np.asarray(values[max(i - window, 0):i])
            checks.append(values[i] - before.mean() <= sigma * before.std(ddof=1))
        yield all(checks)


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_is_the_published_one(seed):
    """On noise around a falling loss, with spikes of all sizes in either value, at any time."""
    rng, steps = np.random.default_rng(seed), 400
    losses = 3 + 4 * np.exp(-np.arange(steps) / 60) + 0.05 * rng.standard_normal(steps)
    norms = np.exp(0.2 * rng.standard_normal(steps))
    for values in (losses, norms):
        values[rng.integers(0, steps, 20)] *= 1 + rng.exponential(2.0, 20)
    config = tiny.config()

    def scan(recent, values):
        taken, recent, _ = bad_steps.judge(recent, *values, config)
        return recent, taken

    _, taken = jax.lax.scan(scan, bad_steps.nothing_yet(), (jnp.float32(losses), jnp.float32(norms)))
    expected = list(published(losses, norms))
    assert taken.tolist() == expected and 3 < expected.count(False) < 20


def test_with_a_threshold_of_zero_only_what_is_not_finite_is_skipped():
    config = tiny.config(faults=FaultsConfig(skip_sigma=0.0))
    recent = bad_steps.nothing_yet()._replace(loss=jnp.linspace(3, 3.1, 128), grad_norm=jnp.linspace(1, 1.1, 128),
                                              count=jnp.int32(200))
    for loss, taken in ((1e30, True), (jnp.inf, False), (jnp.nan, False)):
        assert bool(bad_steps.judge(recent, jnp.float32(loss), jnp.float32(1), config)[0]) is taken


def test_the_window_survives_a_checkpoint_bit_for_bit():
    config, recent = tiny.config(), bad_steps.nothing_yet()
    for loss in np.random.default_rng(0).exponential(size=5):
        _, recent, _ = bad_steps.judge(recent, jnp.float32(loss), jnp.float32(loss / 3), config)
    text = json.dumps(bad_steps.to_json(recent))
    assert_same_bits(host(recent), host(bad_steps.from_json(json.loads(text), recent)))
    assert_same_bits(host(bad_steps.nothing_yet()), host(bad_steps.from_json(None, recent)))


# ---- runs -----------------------------------------------------------------------------------------------------------


class Changed:
    """Batches of a run, some of which are changed by what they hold: `is_bad` of the rows' first tokens gives NaN weights."""

    def __init__(self, batches, change):
        self._batches, self._change = batches, change

    def __next__(self):
        return self._change(next(self._batches))

    def __getattr__(self, name):
        return getattr(self._batches, name)


def key(batch):
    return int(batch["document_ids"].astype(np.int64).sum() * 1009 + batch["tokens"].astype(np.int64).sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_steps")


@pytest.fixture
def poison(monkeypatch):
    """poison(keys, leave_out=keys): batches with these keys have NaN weights; those to leave out never come."""
    batches_of = loop.batches_of

    def poison(keys, leave_out=(), weight=math.nan):
        def change(batch):
            if key(batch) in keys:
                batch = batch | {"loss_weights": np.full_like(batch["loss_weights"], weight)}
            return batch

        class LeavingOut(Changed):
            def __next__(self):
                batch = super().__next__()
                while key(batch) in leave_out:
                    batch = super().__next__()
                return batch

        monkeypatch.setattr(loop, "batches_of", lambda *args: LeavingOut(batches_of(*args), change))

    return poison


@pytest.fixture(scope="module")
def keys(folder):
    """Of the batches of a run in order."""
    config = tiny_config(folder, *CHEAP)
    documents = loop.DocumentsOfPhases(folder).of(config)
    batches = loop.TextBatches(config, documents, (0, 1), None)
    found = [key(next(batches)) for _ in range(80)]
    batches.close()
    assert len(set(found)) == 80
    return found


def test_a_single_bad_step_is_skipped_counted_and_named(folder, tmp_path, poison, keys, capfd):
    poison(keys[4:5])
    result = train(tiny_config(folder, *CHEAP, "train.log_every=2"), tmp_path / "run")
    assert result["step"] == 8
    assert [r["skipped_steps"] for r in records(tmp_path / "run")] == [0, 0, 1, 0]
    assert all(math.isfinite(r["loss"]) and "skipped" not in r for r in records(tmp_path / "run"))
    assert "step 5 is skipped: loss is nan" in capfd.readouterr().err
    poison(keys[3:4])
    train(tiny_config(folder, *CHEAP, "train.log_every=2"), tmp_path / "logged")
    record = records(tmp_path / "logged")[1]
    assert (record["loss"], record["skipped"], record["skipped_steps"]) == (None, True, 1)


def test_too_many_lead_back_and_their_rows_are_left_out(folder, tmp_path, poison, keys, capfd):
    """The steps after that are those of a run that never saw the rows, and so are those of a restart from any checkpoint."""
    overrides = (*CHEAP, "train.steps=16", "checkpoint.every=4", "checkpoint.keep_last=9")
    poison(keys[5:13])
    train(tiny_config(folder, *overrides), tmp_path / "run")
    message = capfd.readouterr().err
    assert "8 steps in a row were skipped, the last, 13, because loss is nan. Rolling back to the checkpoint of step 4;" in (
        message)
    (left_out,) = json.loads((tmp_path / "run" / rollback.FILE).read_text())["rollbacks"]
    assert (left_out["step"], left_out["batches"], left_out["back_to"]) == (6, 8, 4)
    poison((), leave_out=keys[5:13])
    train(tiny_config(folder, *overrides), tmp_path / "other")
    assert series(tmp_path / "run") == series(tmp_path / "other")
    assert all(r["skipped_steps"] == 0 for r in records(tmp_path / "run"))
    time = goodput(str(tmp_path / "run"))
    assert time["starts"] == 1 and all(time["seconds"][cause] > 0 for cause in ("steps", "rollback", "repeated", "restore"))
    for step in (4, 8):
        again = shutil.copytree(tmp_path / "run", tmp_path / f"from{step}")
        for later in checkpoint.steps(again / "checkpoints"):
            if later > step:
                shutil.rmtree(again / "checkpoints" / str(later))
        poison(keys[5:13])
        assert train(tiny_config(folder, *overrides), again)["resumed_from"] == step
        assert series(again) == series(tmp_path / "other")


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before the checkpoints are moved", "before the rows are written down"])
def test_a_kill_during_the_rollback_changes_nothing(moment, folder, tmp_path, poison, keys, monkeypatch):
    overrides = (*CHEAP, "train.steps=14", "checkpoint.every=3", "checkpoint.keep_last=9")
    poison(keys[5:13])
    with monkeypatch.context() as patch:
        place, name = {"before the checkpoints are moved": (rollback.tiers, "forget"),
                       "before the rows are written down": (rollback, "write_json")}[moment]
        patch.setattr(place, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(folder, *overrides), tmp_path / "run")
    train(tiny_config(folder, *overrides), tmp_path / "run")
    poison((), leave_out=keys[5:13])
    train(tiny_config(folder, *overrides), tmp_path / "other")
    assert series(tmp_path / "run") == series(tmp_path / "other")


def test_a_run_whose_every_step_is_bad_ends_after_three_rollbacks_with_advice(folder, tmp_path, poison, keys, capfd):
    poison(keys[2:])
    with pytest.raises(RunError) as failed:
        train(tiny_config(folder, *CHEAP, "train.steps=70", "checkpoint.every=1"), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    message = str(failed.value)
    assert "3 rollbacks have not helped" in message and "of step 2" in message and "lower optimizer.learning_rate" in message
    assert f"emo-jax replay {tmp_path / 'run'} --step 10" in message
    assert len(json.loads((tmp_path / "run" / rollback.FILE).read_text())["rollbacks"]) == 3
    assert capfd.readouterr().err.count("Rolling back") == 3


def test_a_learning_rate_that_diverges_is_named(folder, tmp_path, capsys):
    status = cli.main(["train", str(folder / "tiny.py"), "--out", str(tmp_path / "run"), "--train.steps=120",
                       "--train.log_every=50", "--optimizer.learning_rate=5", "--optimizer.clip_norm=1e6",
                       *(f"--{field}" for field in CHEAP)])
    message = capsys.readouterr().err
    assert status == 1 and "the loss has diverged" in message and "lower optimizer.learning_rate" in message


def test_rows_without_a_loss_end_the_run(folder, tmp_path, poison, keys, capfd):
    poison(keys, weight=0)
    with pytest.raises(RunError, match="no token had a loss in 20 steps in a row, until step 20: data.repetition_filter"):
        train(tiny_config(folder, *CHEAP, "train.steps=60"), tmp_path / "run")
    assert capfd.readouterr().err.count("no token has a loss") == 1


def test_a_stop_while_rolling_back_is_obeyed(folder, tmp_path, poison, keys, monkeypatch):
    poison(keys[2:10])
    roll_back = rollback.roll_back

    def roll_back_and_stop(*args):
        roll_back(*args)
        running[0].stop.requested = "SIGTERM"

    running, run = [], loop.TrainingLoop.run
    monkeypatch.setattr(loop.TrainingLoop, "run", lambda self: running.append(self) or run(self))
    monkeypatch.setattr(loop, "roll_back", roll_back_and_stop)
    with pytest.raises(RestartError, match="the same command goes on"):
        train(tiny_config(folder, *CHEAP, "train.steps=14"), tmp_path / "run")
    assert train(tiny_config(folder, *CHEAP, "train.steps=14"), tmp_path / "run")["step"] == 14


def test_a_damaged_list_of_rows_is_found_and_made_again(folder, tmp_path, poison, keys, capfd):
    poison(keys[3:11])
    config = tiny_config(folder, *CHEAP, "checkpoint.every=2", "checkpoint.keep_last=9", "train.steps=12")
    train(config, tmp_path / "run")
    before, file = series(tmp_path / "run"), tmp_path / "run" / rollback.FILE
    text = file.read_text()
    file.write_text(text.replace('"batches": 8', '"batches": 9'))
    for step in (4, 6, 8, 10, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    train(config, tmp_path / "run")
    assert "its checksum differs" in capfd.readouterr().err
    assert series(tmp_path / "run") == before and file.read_text() == text


TOGETHER = """
import json, math, sys
import numpy as np
from emo_jax import cli
from emo_jax.train import loop
from test_bad_steps import Changed, key

poisoned, left_out, *arguments = sys.argv[1:]
poisoned, left_out = set(json.loads(poisoned)), set(json.loads(left_out))
batches_of = loop.batches_of

class LeavingOut(Changed):
    def __next__(self):
        batch = super().__next__()
        while key(batch) in left_out:
            batch = super().__next__()
        return batch

def change(batch):
    return batch | {"loss_weights": np.full_like(batch["loss_weights"], math.nan)} if key(batch) in poisoned else batch

loop.batches_of = lambda *args: LeavingOut(batches_of(*args), change)
sys.exit(cli.main(arguments))
"""


def test_two_processes_roll_back_together_when_the_rows_of_one_are_bad(folder, tmp_path):
    config, found = tiny_config(folder, *CHEAP), []
    for process in (0, 1):
        documents = loop.DocumentsOfPhases(folder).of(config)
        batches = loop.TextBatches(config, documents, (process, 2), None)
        found.append([key(next(batches)) for _ in range(13)][5:])
        batches.close()
    program = "import sys; sys.path.insert(0, sys.argv.pop(1))\n" + TOGETHER
    overrides = ("--mesh.data=4", "--mesh.fsdp=1", "--data.eval_fraction=0.0", "--train.steps=16", "--checkpoint.every=4")
    for name, poisoned, left_out in (("run", found[1], []), ("other", [], found[0] + found[1])):
        started = start_command(["-c", program, str(Path(__file__).parent), json.dumps(poisoned), json.dumps(left_out), "train",
                                 str(folder / "tiny.py"), "--out", str(tmp_path / name), "--json", *overrides], 2)
        assert finish(started)["step"] == 16
    (rollback_of,) = json.loads((tmp_path / "run" / rollback.FILE).read_text())["rollbacks"]
    assert (rollback_of["step"], rollback_of["batches"], rollback_of["back_to"]) == (6, 8, 4)
    assert series(tmp_path / "run") == series(tmp_path / "other")
