"""The training loop: batches in, steps dispatched ahead of the devices, and everything that happens between steps.

The hot path never waits for a step: metrics are read one step late, and only evaluation, saving and a stop look at
the state. Whatever the mesh, workers or restarts, step k sees the same rows; on the same mesh it is bit-identical.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from emo_jax import compat, ending, machine, processes, sharding
from emo_jax.checkpoints import tiers
from emo_jax.checkpoints.checkpoint import FOLDER
from emo_jax.compilation import keep_programs
from emo_jax.config import Config, flatten, to_dict
from emo_jax.data.waiting import Interrupted
from emo_jax.errors import RestartError, RunError
from emo_jax.files import AnyPath, make_folder, reason
from emo_jax.phases import Phase, phase_at, phases
from emo_jax.progress import is_primary, say
from emo_jax.train import bad_steps, goodput, run_folder, start, trackers
from emo_jax.train.batches import DocumentsOfPhases, TextBatches, TokenBatchesOfPhase, batches_of, check_phases
from emo_jax.train.goodput import Clock
from emo_jax.train.holder import Holder, HolderLost, hold
from emo_jax.train.metrics import MAX_STEPS_IN_FLIGHT, Log
from emo_jax.train.optimizer import reset_moments
from emo_jax.train.profile import Profile
from emo_jax.train.replicas import RepeatCheck, ReplicaCheck
from emo_jax.train.rollback import SkippedRows, roll_back
from emo_jax.train.signals import StopSignals
from emo_jax.train.step import TrainState, make_train_step
from emo_jax.train.verdicts import RollBack
from emo_jax.train.watchdog import DATA, EVALUATION, SAVING, Watchdog

OF_A_HOST = ("data.path", "data.eval_path", "data.mix_root", "data.tokenizer", "data.workers", "data.cache_gb",
             "train.compilation_cache")  # may differ: what is read there is compared by its content
SAVING_S = 10.0  # for which one of several processes that fails waits for a save, which the others may not go on with


def train(config: Config, out: str | AnyPath, evaluations: Iterable = (), start_over: bool = False,
          began: float | None = None) -> dict[str, Any]:
    """Trains `config` into the folder `out`, going on from what is there; returns what `emo-jax train` reports.

    `evaluations`: more of them, made by `make(config, mesh, documents)`; each is None or has a `name` and returns
    numbers for parameters. start_over: at step 0, where the checkpoints that the folder had are gone. began: when this
    process was started to train, in Unix time; None: now.

    Raises `InputError` before the first step for what is wrong with the config, the documents or the folder, and
    `RunError` when the run fails.
    """
    clock = Clock(began)
    processes.start_distributed()
    processes.require_same("code", machine.versions())
    processes.require_same("config", {key: value for key, value in flatten(to_dict(config)).items() if key not in OF_A_HOST})
    sharding.make_mesh(config)  # if that cannot be, nothing is written
    with hold(make_folder(out)) as holder:
        return train_held(config, out, evaluations, holder, start_over, clock)


def train_held(config: Config, out: str | AnyPath, evaluations: Iterable, holder: Holder | None,
               start_over: bool = False, clock: Clock | None = None) -> dict[str, Any]:
    """`train` into a folder that this run holds already."""
    mesh, clock = sharding.make_mesh(config), clock or Clock()
    if is_primary():
        trackers.require_packages(config)
    folder = run_folder.open_folder(config, out)
    keep_programs(config.train.compilation_cache or ("" if jax.default_backend() == "cpu" else folder / "compilation_cache"))
    config, origin = start.find_start(config, folder)
    plan = phases(config)
    for phase in plan:
        sharding.make_mesh(phase.config)
    documents = DocumentsOfPhases(folder)
    while True:
        tiers.prepare(folder, config.checkpoint)
        with compat.set_mesh(mesh):
            clock.lap(goodput.STARTUP)
            position = start.resume(config, mesh, folder, clock.lapping(goodput.RESTORE, documents.of, goodput.STARTUP))
            clock.lap(goodput.RESTORE if position else goodput.STARTUP)
            if position is None:
                run_folder.require_new(config, folder, start_over)
                position = start.initial_position(config, mesh, origin, documents.of)
            position.state = start.with_reference(position.state, config, mesh)
            left = [phase for phase in plan if phase.until > position.step]
            check_phases(left, documents.of, mesh, position.place)
            run_folder.prepare(config, folder)
            if not left:
                say(f"{folder} is at its last step, {position.step}: nothing to do")
            _describe(phase_at(config, position.step).config, mesh, documents, position)
            loop = TrainingLoop(config, mesh, folder, documents, position, left, evaluations, holder, clock)
            del position
            try:
                return loop.run()
            except RollBack as found:
                bad = found
            del loop.state  # there is room for one
            roll_back(folder, bad)
            clock.lap(goodput.ROLLBACK)
            start_over = False
            if processes.any_process(loop.stop.requested is not None):
                raise RestartError("asked to stop while rolling back: the same command goes on from there")


def _describe(config: Config, mesh: Mesh, all_documents: DocumentsOfPhases, position: start.Position) -> None:
    count, documents = sum(x.size for x in jax.tree.leaves(position.state.params)), all_documents.of(config)
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(f"{config.name}: {count:,} parameters on {mesh.size} {mesh.devices.flat[0].device_kind} ({axes}); "
              f"{len(documents.train):,} documents to train on, {len(documents.held_out):,} held out; "
              f"{config.train.batch_size} rows of {config.data.sequence_length} tokens a step")


def enter(phase: Phase, state: TrainState, step: int) -> TrainState:
    """The state that a phase goes on with after `step` steps."""
    if phase.resets_optimizer and step == phase.first_step:
        state = state._replace(opt_state=jax.jit(reset_moments, donate_argnums=0)(state.opt_state))
    if phase.starts_stage and step == phase.first_step:  # losses of other documents, or rows, compare with nothing
        state = state._replace(recent=bad_steps.from_json(None, state.recent))
    return state


class TrainingLoop:
    """One start of a run, from its position through the phases that are left to its last step, a stop, or a failure."""

    phase: Phase
    documents: start.Documents
    batches: TextBatches | TokenBatchesOfPhase | None = None
    evaluate: Any = None  # an `Evaluation`, if documents are held out
    other_evaluations: Sequence = ()
    train_step: Callable[..., Any]
    repeat: RepeatCheck
    before_left_out: dict[str, Any] | None = None  # the data's position while rows are left out, until the step after them
    first_of_phase: int  # the step before its first in this start

    def __init__(self, config: Config, mesh: Mesh, out: AnyPath, documents: DocumentsOfPhases, position: start.Position,
                 left: Sequence[Phase], evaluations: Iterable, holder: Holder | None, clock: Clock):
        self.config, self.mesh, self.out, self.all_documents, self.left = config, mesh, out, documents, left
        self.state, self.step, self.first_step = position.state, position.step, position.step
        self.place, self.make_evaluations, self.holder, self.clock = position.place, tuple(evaluations), holder, clock
        self.writer = tiers.TieredWriter(out, config.checkpoint, position.step, self._items())
        if left:
            self.writer.require_room()
        self.saved_mark = run_folder.SavedMark(out)
        self.watchdog = Watchdog(out, jax.process_index(), config.faults.hang_seconds)
        self.log = Log(config, out, position.step, position.tokens, is_primary(), position.evaluated, clock)
        self.profile = Profile(config.train.profile_steps, out, self.log.say)
        self.saved_step = position.step if (out / FOLDER / str(position.step)).is_dir() else None
        self.skipped_rows = SkippedRows(out)
        self.replicas, self.stop = ReplicaCheck(mesh, config.faults.check_replicas_every), StopSignals()
        self.evaluated: dict[int, dict[str, Any]] = {}  # the latest evaluation, by its step
        self.owes_evaluation = not position.evaluated

    def run(self) -> dict[str, Any]:
        began, stopped = time.monotonic(), None
        ending.last_good = self._found_good
        try:
            with self.stop as stop:
                for phase in self.left:
                    self._begin(phase)
                    stopped = self._steps_of_phase(stop)
                    if stopped:
                        break
                self._finish(stopped)
        except HolderLost as e:  # at once: what threads of this process still write would go into another's folder
            ending.last_good = str
            ending.end(str(e), status=1)
        except BaseException as e:
            self.clock.lap(goodput.STEPS if isinstance(e, RollBack) else goodput.OTHER)
            kept = self._last_good(e)
            self.clock.lap(goodput.SAVE)
            if isinstance(e, OSError):
                raise RunError(f"{e.filename or self.out}: {reason(e)}; {kept}") from e
            if isinstance(e, RunError):
                advice = f"; if it fails again, {e.advice}" if e.advice else ""
                raise type(e)(f"{e}; {kept}{advice}") from e
            raise
        finally:
            self.watchdog.close()
            if self.batches is not None:
                self.batches.close()
            self.profile.close(self.step)
            self.clock.lap(goodput.OTHER)
            self.log.close(done=self.saved_step == self.config.train.steps)
        ending.last_good = str  # else the thread that watches other processes may yet have to say it
        return self._result(stopped, time.monotonic() - began)

    def _begin(self, phase: Phase) -> None:
        """Everything that the steps of a phase need; the step itself compiles when it is first taken."""
        self.watchdog.at("the start of a phase", long=True)
        before = None
        if self.batches is not None:
            before = self.phase.config
            self.place = start.Place(self.batches.position(), before, self.documents.fingerprint)
            self.batches.close()
        self.phase, c, self.documents = phase, phase.config, self.all_documents.of(phase.config)
        if len(self.left) > 1:
            self._say_phase(phase)
        self.state = enter(phase, self.state, self.step)
        self.train_step = make_train_step(c, self.mesh, self.documents.tokenizer.eos_id)
        self.repeat = RepeatCheck(c, self.mesh, self.documents.tokenizer.eos_id)
        group = processes.row_group(self.mesh, c.train.batch_size)
        self.batches = batches_of(self.config, phase, self.all_documents, group, self.place)
        if before is None or (before.model, before.router, before.data) != (c.model, c.router, c.data):
            self.evaluate = start.evaluation_of(c, self.mesh, self.documents)
            made = (make(c, self.mesh, self.documents) for make in self.make_evaluations)
            self.other_evaluations = [evaluation for evaluation in made if evaluation is not None]
        self.log.begin(self.step, c, self.batches.labels)
        self.first_of_phase = self.step
        self.clock.lap(goodput.STARTUP)

    def _say_phase(self, phase: Phase) -> None:
        stage = f"stage {phase.stage}, " if self.config.stages else ""
        self.log.say(f"step {self.step}: {stage}until step {phase.until}: {phase.config.train.batch_size} rows of "
                     f"{phase.config.data.sequence_length} tokens; compiling its step")

    def _steps_of_phase(self, stop: StopSignals) -> str | None:
        """The signal that stopped it."""
        if self.owes_evaluation and self.phase.first_step < self.step and self._evaluation_is_due():
            self._evaluate()
        self.owes_evaluation = False
        while self.step < self.phase.until:
            if self.holder is not None:
                self.holder.check()
            try:
                self._one_step()
            except Interrupted:
                return stop.requested
            self.writer.check()
            if self.saved_step is not None:
                self.saved_mark.note()
            if stop.requested_after(self.step) and self.step < self.config.train.steps:
                return stop.requested
            self._between_steps()
        return None

    def _one_step(self) -> None:
        assert self.batches is not None
        began, first = time.monotonic(), self.step < self.first_of_phase + MAX_STEPS_IN_FLIGHT  # which compile
        if self.profile.before(self.step + 1, self.log.flush):
            self.clock.lap(goodput.OTHER)
        self.watchdog.at(DATA, long=first)
        left_out = self.skipped_rows.before(self.step + 1)
        self.before_left_out = self.batches.position() if left_out else None
        for _ in range(left_out):
            next(self.batches)
        batch = self.log.data_wait.next_batch(self.batches, self.mesh)
        self.before_left_out = None
        self.clock.lap(goodput.DATA_WAIT if self.log.devices_are_idle() else goodput.STEPS)
        self.watchdog.at(f"step {self.step + 1}", long=first)
        self.repeat.before_step(self.step + 1, self.state, batch)
        dispatched = time.monotonic()
        with self.profile.step(self.step + 1):
            self.state, metrics = self.train_step(self.state, batch)
        self.log.waited(time.monotonic() - dispatched)
        if self.step == self.first_of_phase:
            self.clock.lap(goodput.COMPILE)
        self.step += 1
        self.replicas.after_step(self.step, self.state.params)
        self.log.add(self.step, metrics)
        if self.log.is_logged(self.step - 1):
            self.log.flush(until=self.step - 1)
        if self.profile.after(self.step, self.log.flush):
            self.log.restart_clock(self.step)
            self.clock.lap(goodput.OTHER)
        self.clock.lap(goodput.STEPS)
        self.watchdog.stepped(began)

    def _evaluation_is_due(self) -> bool:
        t = self.config.train
        return self.evaluate is not None and (self.step == t.steps or (t.eval_every > 0 and self.step % t.eval_every == 0))

    def _between_steps(self) -> None:
        every, last, evaluate = self.config.checkpoint.every, self.step == self.config.train.steps, self._evaluation_is_due()
        if evaluate:
            self._evaluate()
        best = evaluate and self.writer.ranks_as_best(self.evaluated[self.step]["loss"])
        due = last or ((self.step % every == 0 or best) and self.log.is_good())
        local = not due and self.writer.due(self.step) and self.log.is_good()
        low = None if last else self.writer.low_space(local if due or local else None)
        if due or low:
            self._save()
        elif local:
            self._save(local=True)
        if low:
            raise RunError(f"{low}: stopped after step {self.step}, saved", "free space there, or keep fewer checkpoints "
                           "(checkpoint.keep_last)")

    def _evaluate(self) -> None:
        self.watchdog.at(EVALUATION, long=True)
        self.log.flush()
        self.clock.lap(goodput.STEPS)
        result = self.evaluate(self.state.params)
        if not math.isfinite(result["loss"]):
            raise RunError(f"the held-out loss is {result['loss']} after step {self.step}, though that of the steps is finite",
                           "look at the held-out documents, or lower optimizer.learning_rate")
        self.evaluated = {self.step: result}
        self.log.evaluation(self.step, "held_out", result)
        for evaluate in self.other_evaluations:
            self.log.numbers(self.step, evaluate.name, evaluate(self.state.params))
        self.clock.lap(goodput.EVALUATION)
        self.log.restart_clock(self.step)

    def _items(self) -> dict[str, Any]:
        return {"params": self.state.params, "opt_state": self.state.opt_state}

    def _save(self, local: bool = False) -> None:
        """Only a state after finite steps is saved: the log is read up to here first."""
        self.watchdog.at(SAVING, long=True)
        if self.holder is not None:
            self.holder.confirm()
        self.log.flush()
        self.clock.lap(goodput.STEPS)
        self.replicas.before_save(self.step, self.state.params)
        assert self.batches is not None  # a run without a step to take has nothing to save
        evaluation, began = self.evaluated.get(self.step), time.monotonic()
        self.writer.save(self.step, self._items(), self.config, local=local,
                         tokens=self.log.tokens, source=self.documents.fingerprint,
                         position=self.before_left_out or self.batches.position(),
                         loss=evaluation["loss"] if evaluation else None, recent=bad_steps.to_json(self.state.recent))
        self.clock.lap(goodput.SAVE)
        self.log.saved(time.monotonic() - began)
        if not local:
            self.saved_step = self.step
        self.log.restart_clock(self.step)

    def _finish(self, stopped: str | None) -> None:
        self.watchdog.at(SAVING, long=True)
        if stopped:
            self.log.say(f"stopping after step {self.step} ({stopped}): saving")
        if self.saved_step != self.step:
            self._save()
        self.log.flush()
        self.clock.lap(goodput.STEPS)
        self.writer.close()
        self.saved_mark.note()
        self.clock.lap(goodput.SAVE)

    def _last_good(self, error: BaseException) -> str:
        """Lets the last save finish and says where the run can go on."""
        failed: list[RunError] = []

        def close() -> None:
            try:
                self.writer.close()
            except RunError as e:
                failed.append(e)

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(None if jax.process_count() == 1 else SAVING_S)
        also = f"{failed[0]}; " if failed and str(failed[0]) != str(error) else ""
        return f"{also}{self.writer.last_good()}. The same command goes on from there"

    def _found_good(self) -> str:
        """Where the run can go on if it ends now, whatever its threads do."""
        return f"{self.writer.last_good()}. The same command goes on from there"

    def _result(self, stopped: str | None, seconds: float) -> dict[str, Any]:
        return {
            "out": str(self.out), "step": self.step, "steps": self.config.train.steps, "stopped": stopped,
            "resumed_from": self.first_step or None, "tokens": self.log.tokens, "loss": self.log.last.get("loss"),
            "tokens_per_second": self.log.last.get("tokens_per_second"),
            "held_out": self.evaluated.get(self.step), "seconds": seconds,
            "checkpoint": str(self.out / FOLDER / str(self.saved_step)),
        }
