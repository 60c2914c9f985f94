"""train.profile_steps: a trace of some steps, in which the parts of the model are found by their names."""

import jax
import pytest
from profiles import scopes_and_steps
from tiny_run import config_file, series, tiny_config
from two_processes import finish, start

from emo_jax.errors import InputError
from emo_jax.train.loop import train

PARTS = {"embedding", "norm", "projections", "attention", "routing", "dispatch", "experts", "loss", "optimizer"}


def traces(out):
    return sorted((out / "profile").rglob("*.xplane.pb"))


def test_a_trace_has_its_steps_and_the_parts_of_the_model_by_name(tmp_path, capsys):
    train(tiny_config(tmp_path, "--train.steps=6", "--train.profile_steps=3:4"), tmp_path / "run")
    (trace,) = traces(tmp_path / "run")
    assert trace.parent == tmp_path / "run" / "profile" / "plugins" / "profile" / "steps_3_4"  # where XProf looks
    scopes, steps = scopes_and_steps(trace)
    assert scopes > PARTS and steps == {3, 4}
    assert f"xprof --logdir {tmp_path}/run/profile" in capsys.readouterr().err
    train(tiny_config(tmp_path, "--train.steps=6"), tmp_path / "other")
    assert series(tmp_path / "run") == series(tmp_path / "other") and not (tmp_path / "other" / "profile").exists()


def test_a_run_that_ends_or_begins_in_between_keeps_the_steps_that_it_took(tmp_path):
    for steps, expected in ((3, {2, 3}), (5, {4, 5})):
        train(tiny_config(tmp_path, f"--train.steps={steps}", "--train.profile_steps=2:9"), tmp_path / "run")
        session = tmp_path / "run" / "profile" / "plugins" / "profile" / f"steps_{min(expected)}_{max(expected)}"
        assert scopes_and_steps(next(session.iterdir()))[1] == expected


def test_a_profile_that_cannot_be_taken_costs_no_step(tmp_path, capsys):
    with jax.profiler.trace(str(tmp_path / "another")):
        result = train(tiny_config(tmp_path, "--train.steps=4", "--train.profile_steps=2:3"), tmp_path / "run")
    assert result["step"] == 4 and capsys.readouterr().err.count("steps 2 to 3 are not profiled: ") == 1
    assert not (tmp_path / "run" / "profile").exists()


def test_a_profile_that_cannot_be_written_costs_no_step(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file")
    result = train(tiny_config(tmp_path, "--train.steps=4", "--train.profile_steps=2:3"), tmp_path / "run")
    assert result["step"] == 4 and "the profile of steps 2 to 3 could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["5", "5:", ":5", "0:3", "6:5", "1:2:3", "-1:2", "a:b", "1:٣", f"1:{'9' * 30}"])
def test_steps_that_are_none_are_refused(given, tmp_path):
    with pytest.raises(InputError, match="train.profile_steps=.* must be FIRST:LAST"):
        tiny_config(tmp_path, f"--train.profile_steps={given}")


def test_every_process_writes_its_own(tmp_path):
    finish(start(str(config_file(tmp_path)), tmp_path / "run", 2, "--train.steps=4", "--train.profile_steps=2:3"))
    found = traces(tmp_path / "run")
    assert [path.name[-len("_0.xplane.pb"):] for path in found] == ["_0.xplane.pb", "_1.xplane.pb"]
    assert found[0].parent == found[1].parent  # one session with two hosts
    for trace in found:
        scopes, steps = scopes_and_steps(trace)
        assert scopes >= {"routing", "dispatch", "experts"} and steps == {2, 3}
