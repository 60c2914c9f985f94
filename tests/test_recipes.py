"""The page of recipes: its commands are commands, its settings are fields, and what it promises of going on is so."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_run import records, series, tiny_config, write_documents

from emo_jax import cli
from emo_jax.commands.arguments import take_overrides
from emo_jax.config import Config, flatten, load_config, to_dict
from emo_jax.phases import phases
from emo_jax.train.loop import train

PAGE = (Path(__file__).parent.parent / "configs/README.md").read_text()
MESH = ("mesh.fsdp=4", "mesh.data=2")


@pytest.mark.parametrize("line", [line for block in re.findall("```bash\n(.*?)```", PAGE, re.DOTALL)
                                  for line in block.splitlines() if line.startswith("emo-jax")])
def test_every_command_is_one(line):
    argv, overrides = take_overrides(shlex.split(line)[1:])
    args = cli.parser().parse_args(argv)
    phases(load_config(args.config, overrides))


def test_every_setting_is_a_field():
    fields = flatten(to_dict(Config(name="x")))
    named = [name for cell in re.findall(r"^\|.*?\|(.*)\|$", PAGE, re.MULTILINE)
             for name in re.findall(r"\b((?:model|router|data|optimizer|train|checkpoint|faults|mesh)\.\w+)", cell)]
    assert len(named) > 40
    assert not [name for name in named if name not in fields and name != "train.eval_"]


def pool_sizes(out):
    return {r["step"]: max(r["pool_size_mean"]) for r in records(out)}


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard")
    train(tiny_config(folder, *MESH, "router.document_pool=false", "train.steps=3"), folder / "run")
    return folder


def test_a_standard_model_goes_on_as_emo_and_on_other_documents(standard, tmp_path):
    emo = (*MESH, f"train.init_from={standard / 'run'}", f"data.tokenizer={standard / 'run/tokenizer.json'}", "train.steps=6")
    train(tiny_config(standard, *emo), tmp_path / "emo")
    assert [step for step, _ in series(tmp_path / "emo")] == [4, 5, 6]
    routed = 7
    assert set(pool_sizes(standard / "run").values()) == {routed}
    assert all(size < routed for size in pool_sizes(tmp_path / "emo").values())
    assert records(tmp_path / "emo")[0]["tokens"] > records(standard / "run")[-1]["tokens"]
    other = write_documents(tmp_path / "other.jsonl", seed=1)
    train(tiny_config(standard, *emo, f"data.path={other}"), tmp_path / "other")
    assert [step for step, _ in series(tmp_path / "other")] == [4, 5, 6]
    assert series(tmp_path / "other") != series(tmp_path / "emo")


def test_pools_are_off_in_the_last_stage_also_after_a_restart(standard, tmp_path):
    changed = load_config("emo_1b14b_pools_off")
    assert [p.config.router.document_pool for p in phases(changed)] == [True, False]
    assert {p.config.train.steps for p in phases(changed)} == {changed.train.steps}  # one schedule
    staged = (standard / "tiny.py").read_text().replace("return Config(", "return Config(stages=(Stage(until=2), Stage("
                                                        "changes=('router.document_pool=false',))),")
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "tiny.py").write_text(staged)
    config = tiny_config(folder, *MESH, "train.steps=4", "checkpoint.every=1", "checkpoint.keep_last=9")
    train(config, tmp_path / "whole")
    sizes = pool_sizes(tmp_path / "whole")
    assert sizes[1] < 7 and sizes[2] < 7 and sizes[3] == sizes[4] == 7
    run = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(run / "checkpoints/4")
    before = series(tmp_path / "whole")
    train(config, run)
    assert series(run) == before
