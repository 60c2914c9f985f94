"""A step again from its checkpoint: the same numbers, and what they are made of. Nothing is written."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import records, tiny_config

from emo_jax import cli
from emo_jax.errors import InputError
from emo_jax.train.loop import train
from emo_jax.train.replay import replay

CHEAP = ("mesh.data=2", "mesh.expert=2", "data.eval_fraction=0.0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """8 steps, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("replay")
    train(tiny_config(folder, *CHEAP, "checkpoint.every=3", "checkpoint.keep_last=9", "train.microbatches=2",
                      "train.batch_size=16"), folder / "run")
    return folder / "run"


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("step, restored", [(5, 3), (2, 0)])
def test_a_step_again_has_the_same_bits_and_its_parts_add_up(run, step, restored):
    before, result = snapshot(run), replay(run, step, times=2)
    assert snapshot(run) == before
    record = next(r for r in records(run) if r["step"] == step)
    assert result["restored_from"] == restored and result["recorded"]["different"] == {} and not result["skipped"]
    assert len(result["recorded"]["compared"]) > 10 and result["numbers"]["loss"] == record["loss"]
    assert result["repeats"] == {"times": 2, "identical": True, "different": ""}
    rows, norms = result["rows"], result["gradient_norms"]
    assert sorted(r["row"] for r in rows) == list(range(16)) and [r["loss"] for r in rows] == sorted(
        (r["loss"] for r in rows), reverse=True)
    tokens = np.array([r["loss_tokens"] for r in rows])
    np.testing.assert_allclose(np.dot(tokens, [r["loss"] for r in rows]) / tokens.sum(), record["loss"], rtol=1e-6)
    assert result["loss_by_label"] == pytest.approx(record["loss_by_label"], rel=1e-6)
    squares = sum(np.sum(np.square(norm)) for norm in norms.values())
    np.testing.assert_allclose(np.sqrt(squares), record["grad_norm"], rtol=1e-6)
    layers = np.sqrt(sum(np.square(norm) for name, norm in norms.items() if name.startswith("layers.")))
    np.testing.assert_allclose(layers, record["grad_norm_by_layer"], rtol=1e-5)
    words = {"color": "red green blue gray pink".split(), "count": "one two six ten".split()}
    for document in (d for row in rows for d in row["documents"]):  # of which a row may hold any part
        whole = document["text"].removesuffix("<|endoftext|>").split()[1:-1]
        assert set(whole) <= set(words[document["label"]])


def test_on_another_mesh_it_says_by_how_much_it_differs(run, capsys):
    assert cli.main(["replay", str(run), "--step", "4", "--json", "--mesh.data=8", "--mesh.expert=1", "--mesh.fsdp=1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recorded"]["different"]
    for there, now in result["recorded"]["different"].values():
        np.testing.assert_allclose(there, now, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_replayed_is_refused(run, tmp_path, capsys):
    assert cli.main(["replay", str(run), "--step", "9"]) == 2
    assert "expected 1 to 8" in capsys.readouterr().err
    with pytest.raises(InputError, match="it has no config.json"):
        replay(tmp_path, 1)
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="it has no tokenizer.json"):
        replay(copy, 1)
