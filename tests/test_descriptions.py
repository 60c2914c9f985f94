"""Whatever happens to the files of a run, it goes on exactly from what is intact, or says what is wrong."""

import json
import os
import random
import shutil

import pytest
from damage import damage
from tiny_run import records, series, tiny_config, write_documents

from emo_jax.checkpoints import checkpoint, description
from emo_jax.checkpoints.checkpoint import open_checkpoint, read_step
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.cli import main
from emo_jax.errors import InputError, RunError
from emo_jax.train.loop import train

FAULTS = int(os.environ.get("EMO_JAX_FAULTS", "6"))  # random damages, each of a copy of a run that is then gone on with
RUN = ("mesh.fsdp=1", "checkpoint.every=2", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """A run of 8 steps with checkpoints of steps 2, 4, 6 and 8."""
    train(tiny_config(folder, *RUN), folder / "whole")
    return folder / "whole"


@pytest.fixture
def out(whole, tmp_path):
    """A copy of it as it was after 6 steps."""
    return stopped(whole, tmp_path / "run")


def stopped(whole, out):
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "8")
    return out


def go_on(folder, out, *overrides, **options):
    return train(tiny_config(folder, *RUN, *overrides), out, **options)


# ---- at random -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(FAULTS))
def test_a_damaged_run_goes_on_exactly_or_says_what_is_wrong(folder, whole, out, seed, capsys):
    rng = random.Random(seed)
    done = "\n".join(damage(rng, out) for _ in range(rng.choice((1, 1, 1, 2, 4))))
    try:
        result = go_on(folder, out)
    except (InputError, RunError) as e:
        assert str(out) in str(e), done  # which file
        return
    assert_as_undisturbed(out, whole, result, done)
    if result["resumed_from"] != 6 and (out / "checkpoints").is_dir():  # an older one was used: what became of step 6 is said
        assert "6" in capsys.readouterr().err, done


def assert_as_undisturbed(out, whole, result, done=""):
    first = result["resumed_from"] or 0
    assert [x for x in series(out) if x[0] > first] == [x for x in series(whole) if x[0] > first], done
    ends = [open_checkpoint(path, 8) for path in (out, whole)]
    assert ends[0].meta["checksums"] == ends[1].meta["checksums"] and ends[0].data == ends[1].data, done
    assert ends[0].meta["tokens"] == ends[1].meta["tokens"], done
