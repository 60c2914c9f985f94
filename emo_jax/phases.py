"""The parts of a run that one training step and one kind of batch serve: its stages, cut where the batch size changes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

from emo_jax.config import Config, Stage, override
from emo_jax.errors import InputError

ALLOWED = ("data.", "router.", "optimizer.", "train.batch_size", "train.microbatches", "train.remat", "model.attention_scope",
           "model.rope_theta")
FIXED = {  # but not these
    "data.tokenizer": "a model has one tokenizer", "data.eos_token": "a model has one tokenizer",
    "data.eval_fraction": "what is held out would have been trained on before",
    "optimizer.start_step": "the schedule of a stage that sets an optimizer field starts with the stage",
}


@dataclass(frozen=True)
class Phase:
    """The steps after `first_step` up to `until`, as `config` (which has no stages) describes them. Its `train.steps` and
    `optimizer.start_step` are where its learning-rate schedule ends and starts."""

    first_step: int
    until: int
    stage: int  # its index
    config: Config
    starts_stage: bool
    resets_optimizer: bool


def phases(config: Config) -> list[Phase]:
    """All of a run, in order. Raises `InputError` naming the stage and field that is wrong."""
    if not config.stages and not config.train.batch_ramp:
        return [Phase(0, config.train.steps, 0, config, True, False)]
    stages = config.stages or (Stage(),)
    firsts = _first_steps(config, stages)
    ramp = [(step, rows) for step, rows in parse_ramp(config) if step < firsts[-1]]
    starts = sorted({*firsts[:-1], *(step for step, _ in ramp)})
    ends, found = [*starts[1:], firsts[-1]], []
    for start, end in zip(starts, ends):
        stage = max(i for i, first in enumerate(firsts[:-1]) if first <= start)
        rows = next((rows for step, rows in parse_ramp(config) if start < step), None)
        begins = start == firsts[stage]
        found.append(Phase(start, end, stage, _config(config, stages, firsts, stage, rows), begins,
                           begins and stages[stage].reset_optimizer))
    return found


def phase_at(config: Config, step: int) -> Phase:
    """The phase that goes on after `step` steps; after the last step, the last one."""
    found = phases(config)
    return next((phase for phase in found if step < phase.until), found[-1])


def trained_config(config: Config, step: int) -> Config:
    """What the state after `step` steps was trained with last."""
    return phase_at(config, max(step - 1, 0)).config


def parse_ramp(config: Config) -> list[tuple[int, int]]:
    """[(step, rows)]: so many rows until that step. Raises `InputError`."""
    try:
        parts = [part.split(":") for part in config.train.batch_ramp.split(",") if part]
        ramp = [(int(step), int(rows)) for step, rows in parts]
        steps = [0, *(step for step, _ in ramp)]
        if any(step <= before for before, step in pairwise(steps)) or any(rows < 1 for _, rows in ramp):
            raise ValueError
    except ValueError:
        raise InputError(f"config {config.name}: train.batch_ramp={config.train.batch_ramp!r} must be STEP:ROWS,STEP:ROWS with "
                         f"ever higher steps, such as 1000:256,4000:512: until that step that many rows") from None
    return ramp


def _first_steps(config: Config, stages: tuple[Stage, ...]) -> list[int]:
    """The first step of every stage, and the end of the last."""
    firsts, steps = [0], config.train.steps
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if last and stage.until in (0, steps):
            firsts.append(steps)
        elif last or not firsts[-1] < stage.until < steps:
            raise InputError(f"config {config.name}: stages.{number}.until={stage.until} must be "
                             + (f"0 or train.steps={steps}, as this is the last stage" if last else
                                f"a step after {firsts[-1]}, where the stage begins, and before train.steps={steps}"))
        else:
            firsts.append(stage.until)
    return firsts


def _config(config: Config, stages: tuple[Stage, ...], firsts: list[int], stage: int, rows: int | None) -> Config:
    """The config of a stage: changes hold for the later stages too. rows: the batch size of the ramp."""
    where = f"config {config.name}: stages.{stage}"
    for change in stages[stage].changes:
        _require_allowed(change, f"{where}.changes: {change!r}")
    scheduled = [number for number, s in enumerate(stages) if any(_key(c).startswith("optimizer.") for c in s.changes)]
    start = max([firsts[number] for number in scheduled if number <= stage], default=0)
    end = min((firsts[number] for number in scheduled if number > stage), default=config.train.steps)
    changes = [change for s in stages[:stage + 1] for change in s.changes]
    changes.append(f"train.steps={end}")
    if start or config.optimizer.start_step >= 0:
        changes.append(f"optimizer.start_step={min(max(start, config.optimizer.start_step), end - 1)}")
    if rows is not None:
        changes.append(f"train.batch_size={rows}")
    plain = dataclasses.replace(config, stages=(), train=dataclasses.replace(config.train, batch_ramp=""))
    try:
        made = override(plain, changes)
    except InputError as e:
        raise InputError(f"{where if config.stages else f'config {config.name}: train.batch_ramp'}: {e}") from None
    if (made.optimizer.trainable == "all") != (config.optimizer.trainable == "all"):
        raise InputError(f"{where}: optimizer.trainable={made.optimizer.trainable!r} gives the optimizer another form of state "
                         f"than {config.optimizer.trainable!r}; train that part as a run of its own")
    return made


def _key(change: str) -> str:
    return change.removeprefix("--").partition("=")[0]


def _require_allowed(change: str, where: str) -> None:
    key = _key(change)
    if key in FIXED:
        raise InputError(f"{where}: a stage cannot change {key}: {FIXED[key]}")
    if not any(key.startswith(name) if name.endswith(".") else key == name for name in ALLOWED):
        raise InputError(f"{where}: a stage can change {', '.join(name + '*' * name.endswith('.') for name in ALLOWED)}")
