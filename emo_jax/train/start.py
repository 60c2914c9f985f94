"""What a run stands on before its first step: its documents and tokenizer, and the state it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from emo_jax import processes, sharding
from emo_jax.checkpoints import tiers
from emo_jax.checkpoints.checkpoint import FOLDER, Checkpoint, first_readable, open_checkpoint, read_step
from emo_jax.checkpoints.compatibility import (
    require_same_data,
    require_same_model,
    require_same_optimizer,
    same_documents,
    same_rows,
    same_source,
)
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.config import Config
from emo_jax.data.evaluation import evaluation_rows, evaluation_set
from emo_jax.data.general import with_general
from emo_jax.data.order import DocumentNumbers, split
from emo_jax.data.sources import Source, open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, remove_tree
from emo_jax.phases import phase_at, trained_config
from emo_jax.progress import is_primary, say
from emo_jax.train import bad_steps
from emo_jax.train.evaluate import Evaluation
from emo_jax.train.run_folder import set_aside
from emo_jax.train.step import TrainState, abstract_state, init_state

# ---- documents ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Documents:
    """The documents of a run: everything that its batches and its evaluation are made of."""

    source: Source
    train: DocumentNumbers
    evaluated: Source  # `source`, or that of data.eval_path
    held_out: np.ndarray  # documents of `evaluated`, none of which is trained on
    tokenizer: Tokenizer
    fingerprint: dict[str, Any]


def open_documents(config: Config, out: AnyPath) -> Documents:
    """The primary process trains (or copies) the tokenizer into `out`, the others read it there."""
    source = open_source(config.data)
    train, held_out = split(source, config.data, config.seed)
    evaluated, held_out = evaluation_set(config.data) if config.data.eval_path else (source, held_out)
    if not is_primary():
        processes.wait_for_all("tokenizer")
    tokenizer = load_tokenizer(config, source, train, out)
    if is_primary():
        copy = out / "tokenizer.json"
        if not copy.is_file() or copy.read_bytes() != tokenizer.content:
            copy.write_bytes(tokenizer.content)
        processes.wait_for_all("tokenizer")
    if config.data.general_every:
        source, train = with_general(source, train, config)
    return Documents(source, train, evaluated, held_out, tokenizer, fingerprint(source, tokenizer))


def fingerprint(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Identifies documents and tokenizer, wherever their files lie: the number of documents, and hashes. The files are read, if
    they must be, by the primary process only. Raises `InputError` if the processes see different ones."""
    sample = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        sample.update(source[int(i)].content)
    seen = {"documents": len(source), "sample": sample.hexdigest()[:16],
            "tokenizer": hashlib.sha256(tokenizer.content).hexdigest()[:16]}
    processes.require_same("data", seen)
    content = (source.content_hash() if is_primary() else "").encode().ljust(64)
    content = processes.gather(np.frombuffer(content, np.uint8))[0].tobytes().decode().strip()
    return seen | {"content": content}


def evaluation_of(config: Config, mesh: Mesh, documents: Documents) -> Evaluation | None:
    """The `Evaluation` on the documents that are not trained on, or None if there are none."""
    if not len(documents.held_out):
        return None
    rows = evaluation_rows(config, documents.evaluated, documents.tokenizer, documents.held_out)
    return Evaluation(config, mesh, rows, documents.tokenizer) if rows else None


# ---- state ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a run stands in its data."""

    position: dict[str, Any]  # as the `position` of `batches.TextBatches`
    config: Config  # of the phase that it was left by
    source: dict[str, Any]  # the fingerprint of its documents

    def goes_on(self, config: Config, documents: Documents) -> bool:
        """Whether a phase reads on, rather than begin with the first document of others."""
        return same_source(self.source, documents.fingerprint) and same_documents(self.config, config)


@dataclasses.dataclass
class Position:
    """Where a run goes on: its state, the tokens it has seen, and its place in the data."""

    state: TrainState
    step: int
    tokens: int
    place: Place | None  # None: at the first document
    evaluated: bool = True  # False: it was stopped before an evaluation that may be due after this step


def find_start(config: Config, out: AnyPath) -> tuple[Config, Checkpoint | None]:
    """The config with `optimizer.start_step` filled in, and the checkpoint of `train.init_from` if the run starts
    there (not if it goes on from a checkpoint of its own). Raises `InputError`."""
    own = tiers.step_folders(out, config.checkpoint)
    counts = processes.gather(np.array(int(own[0].name) if own else -1))
    if len(set(counts.tolist())) > 1:
        raise InputError(f"the processes see different checkpoints in --out {out} (newest steps "
                         f"{', '.join(map(str, counts))}); it must be on storage that all of them share")
    if own:
        last = first_readable(own)
        return _with_start(config, last.run_config.optimizer.start_step if last else 0), None
    if not config.train.init_from:
        return _with_start(config, 0), None
    origin = open_checkpoint(config.train.init_from)
    require_same_model(origin.config, config, f"train.init_from={config.train.init_from}", anneal=True)
    if "opt_state" not in origin.meta["checksums"]:
        raise InputError(f"train.init_from={config.train.init_from} holds parameters only (it was imported or extracted); "
                         f"give train.init_params_from instead, which begins with a new optimizer")
    if origin.step >= config.train.steps:
        raise InputError(f"train.steps={config.train.steps} is the final step and must be more than the "
                         f"{origin.step} steps of train.init_from={config.train.init_from}")
    return _with_start(config, origin.step), origin


def _with_start(config: Config, start: int) -> Config:
    if config.optimizer.start_step >= 0:
        return config
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, start_step=start))


def initial_position(config: Config, mesh: Mesh, origin: Checkpoint | None,
                     documents_of: Callable[[Config], Documents]) -> Position:
    """A new run's: fresh parameters, or those of `origin`, with its place in the documents if they are the same."""
    if origin is None:
        return Position(_initial_state(config, mesh), 0, 0, None)
    state = restore_state(origin, abstract_state(config, mesh))
    state = state._replace(recent=bad_steps.from_json(None, state.recent))  # its documents may have other losses
    place = Place(origin.position(), origin.config, origin.meta["source"])
    phase = phase_at(config, origin.step).config
    same = place.goes_on(phase, documents_of(phase))
    if "stages" in place.position:  # rows are counted, and have to be the same ones
        same &= len(place.position["stages"]) == 1 and same_rows(place.config, phase)
    say(f"starting from step {origin.step} of {origin.path}: parameters and optimizer, and "
        + ("its place in the documents" if same else "the first document, as the documents or the rows are others"))
    return Position(state, origin.step, origin.meta["tokens"], place if same else None)


def _initial_state(config: Config, mesh: Mesh) -> TrainState:
    state, path = init_state(config, mesh), config.train.init_params_from
    if not path:
        return state
    found = open_checkpoint(path)
    require_same_model(found.config, config, f"train.init_params_from={path}", anneal=True)
    moments = config.train.init_moments
    say(f"starting with the parameters of step {found.step} of {found.path}, and "
        + ("the moments of its optimizer" if moments else "a fresh optimizer"))
    state = state._replace(params=found.restore_params(mesh, config))
    return state._replace(opt_state=_with_moments(state.opt_state, found, config, mesh)) if moments else state


def _with_moments(opt_state: Any, found: Checkpoint, config: Config, mesh: Mesh) -> Any:
    """The state of an optimizer that has taken no step, with the moments, and the steps that they are of, of a checkpoint."""
    if "opt_state" not in found.meta["checksums"]:
        raise InputError(f"train.init_moments: {found.path} holds parameters only (it was imported, extracted or merged)")
    theirs = dataclasses.replace(config, optimizer=dataclasses.replace(found.config.optimizer, start_step=-1),
                                 router=found.config.router)
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)
    saved = found.restore({"opt_state": abstract_state(theirs, mesh).opt_state})["opt_state"]
    moments = next(part for part in jax.tree.leaves(saved, is_leaf=is_adam) if is_adam(part))
    return jax.tree.map(lambda part: moments if is_adam(part) else part, opt_state, is_leaf=is_adam)


def with_reference(state: TrainState, config: Config, mesh: Mesh) -> TrainState:
    """With the model that train.divergence_weight compares with, if it does."""
    t = config.train
    if not t.divergence_weight:
        return state
    if not t.init_params_from:
        raise InputError(f"train.divergence_weight={t.divergence_weight} needs train.init_params_from, the other model")
    if t.batch_size % (config.data.general_every * (shards := sharding.batch_shards(mesh))):
        raise InputError(f"train.batch_size={t.batch_size} must be a multiple of data.general_every="
                         f"{config.data.general_every} x the {shards} shards of the batch, for train.divergence_weight")
    return state._replace(reference=open_checkpoint(t.init_params_from).restore_params(mesh, config))


def resume(config: Config, mesh: Mesh, out: AnyPath, documents_of: Callable[[Config], Documents]) -> Position | None:
    """The position of the newest checkpoint that can be read; damaged ones are moved to `damaged/`, not deleted.

    None if there is no checkpoint. documents_of: those of a phase. Raises `InputError` if there are checkpoints but none can
    be read, or if they are of another model or other documents, or of a later step than the last.
    """
    folders, damaged = tiers.step_folders(out, config.checkpoint), []
    target = abstract_state(config, mesh)
    for path in folders:
        try:
            found = _read_together(path)
            require_goes_on(found, config)
            state = restore_state(found, target)
            require_documents(found, config, documents_of)  # opened now: their index has no memory while arrays are read
        except DamagedCheckpoint as e:
            say(f"damaged: {e}")
            damaged.append(path)
            continue
        _set_aside(out, damaged)
        say(f"resuming from step {found.step} of {path.parent}")
        return Position(state, found.step, found.meta["tokens"], Place(found.position(), found.config, found.meta["source"]),
                        evaluated=found.meta.get("held_out_loss") is not None)
    if damaged:
        raise InputError(f"none of the checkpoints in {out / FOLDER} can be read (steps {', '.join(p.name for p in damaged)}, "
                         f"messages above); nothing was changed. To start anew, give another --out")
    return None


def _read_together(path: AnyPath) -> Checkpoint:
    """Raises `DamagedCheckpoint` on every process if one cannot read it, so that all fall back together."""
    found = error = None
    try:
        found = read_step(path)
    except DamagedCheckpoint as e:
        error = e
    if processes.any_process(found is None) or found is None:
        raise error or DamagedCheckpoint(f"checkpoint {path}: it cannot be read on another process")
    return found


def require_goes_on(found: Checkpoint, config: Config) -> None:
    """Raises `InputError` if the run that `config` describes is another one than that of its checkpoint."""
    where = str(found.path)
    require_same_model(found.run_config, config, where)
    require_same_optimizer(found.run_config, config, where)
    if found.step > config.train.steps:
        raise InputError(f"{found.run} has been trained to step {found.step}, and train.steps={config.train.steps} is less: "
                         f"give {found.step} or more, or another --out")
    require_same_data(found.run_config, config, found.step, where)


def require_documents(found: Checkpoint, config: Config, documents_of: Callable[[Config], Documents]) -> None:
    """Raises `InputError` if the documents are others than those of the checkpoint."""
    documents = documents_of(trained_config(config, found.step))
    if not same_source(found.meta["source"], documents.fingerprint):
        raise InputError(f"{found.path} was trained on other documents or another tokenizer than config {config.name} names: "
                         f"{found.meta['source']} there, {documents.fingerprint} given; give the same data.path and "
                         f"data.tokenizer, or another --out")


def restore_state(found: Checkpoint, target: TrainState) -> TrainState:
    """The training state, laid out as `target` (of `abstract_state`) asks. Raises `DamagedCheckpoint`."""
    items = found.restore({"params": target.params, "opt_state": target.opt_state})
    return TrainState(step=jax.device_put(np.int32(found.step), target.step.sharding),
                      recent=bad_steps.from_json(found.meta.get("recent"), target.recent), **items)


def _set_aside(out: AnyPath, damaged: list[AnyPath]) -> None:
    for path in damaged if is_primary() else ():
        if tiers.is_local(path, out):
            remove_tree(path)
            say(f"deleted the damaged checkpoint {path} of checkpoint.local")
        else:
            set_aside(out, path, "is damaged")
    if damaged:
        processes.wait_for_all("damaged checkpoints set aside")
