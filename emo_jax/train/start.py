"""What a run stands on before its first step: its folder, documents and tokenizer, and the state it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from emo_jax import config as config_lib
from emo_jax import processes
from emo_jax.checkpoints import tiers
from emo_jax.checkpoints.checkpoint import FOLDER, Checkpoint, move_step, open_checkpoint, read_step
from emo_jax.checkpoints.compatibility import require_same_data, require_same_model, same_documents, same_rows
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.config import Config
from emo_jax.data.evaluation import evaluation_rows, evaluation_set
from emo_jax.data.order import DocumentNumbers, split
from emo_jax.data.sources import Source, open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, make_folder, remove_tree, write_text
from emo_jax.phases import phase_at, trained_config
from emo_jax.progress import is_primary, say
from emo_jax.train.evaluate import Evaluation
from emo_jax.train.step import TrainState, abstract_state, init_state

# ---- folder ---------------------------------------------------------------------------------------------------------


def open_folder(config: Config, out: str | AnyPath) -> AnyPath:
    """Makes the run's folder, or checks that what is there belongs to the same model. Raises `InputError`."""
    folder = make_folder(out)
    saved = folder / "config.json"
    if saved.exists():
        try:
            before = config_lib.from_dict(json.loads(saved.read_text()))
        except (ValueError, TypeError, AttributeError, OSError) as e:
            raise InputError(f"{saved} cannot be read ({e}); it belongs to the run in --out") from None
        require_same_model(before, config, str(saved))
    if (checkpoints := folder / FOLDER).exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints} is a file; it must be the folder of the run's checkpoints")
    return folder


def write_config(config: Config, out: AnyPath) -> None:
    if is_primary():
        write_text(out / "config.json", config_lib.dumps(config))


def cache_compilation(out: AnyPath) -> None:
    """Keeps compiled programs in the run's folder, so that a restart begins at once and with the same kernels.

    Not on CPU: XLA specialises its code for the host's processor, and the next host may be another.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(out / "compilation_cache"))


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
    return Documents(source, train, evaluated, held_out, tokenizer, fingerprint(source, tokenizer))


def fingerprint(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Identifies documents and tokenizer, wherever their files lie: the number of documents, and hashes."""
    sample = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        sample.update(source[int(i)].content)
    return {"documents": len(source), "sample": sample.hexdigest()[:16],
            "tokenizer": hashlib.sha256(tokenizer.content).hexdigest()[:16]}


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
        return self.source == documents.fingerprint and same_documents(self.config, config)


@dataclasses.dataclass
class Position:
    """Where a run goes on: its state, the tokens it has seen, and its place in the data."""

    state: TrainState
    step: int
    tokens: int
    place: Place | None  # None: at the first document


def find_start(config: Config, out: AnyPath) -> tuple[Config, Checkpoint | None]:
    """The config with `optimizer.start_step` filled in, and the checkpoint of `train.init_from` if the run starts
    there (not if it goes on from a checkpoint of its own). Raises `InputError`."""
    own = tiers.step_folders(out, config.checkpoint)
    counts = processes.gather(np.array(int(own[0].name) if own else -1))
    if len(set(counts.tolist())) > 1:
        raise InputError(f"the processes see different checkpoints in --out {out} (newest steps "
                         f"{', '.join(map(str, counts))}); it must be on storage that all of them share")
    saved = out / "config.json"
    if own and saved.exists():
        start = config_lib.from_dict(json.loads(saved.read_text())).optimizer.start_step
        return _with_start(config, start), None
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
    say(f"starting with the parameters of step {found.step} of {found.path}, and a fresh optimizer")
    return state._replace(params=found.restore_params(mesh, config))


def resume(config: Config, mesh: Mesh, out: AnyPath, documents_of: Callable[[Config], Documents]) -> Position | None:
    """The position of the newest checkpoint that can be read; damaged ones are moved to `damaged/`, not deleted.

    None if there is no checkpoint. documents_of: those of a phase. Raises `InputError` if there are checkpoints but none can
    be read, or if they are of another model or other documents.
    """
    folders, damaged = tiers.step_folders(out, config.checkpoint), []
    target = abstract_state(config, mesh)
    for path in folders:
        try:
            found = read_step(path)
            require_same_model(found.run_config, config, str(path))
            require_same_data(found.run_config, config, found.step, str(path))
            documents = documents_of(trained_config(config, found.step))
            if found.meta["source"] != documents.fingerprint:
                raise InputError(f"{found.path} was trained on other documents or another tokenizer than config "
                                 f"{config.name} names: {found.meta['source']} there, {documents.fingerprint} given; "
                                 f"give the same data.path and data.tokenizer, or another --out")
            position, state = found.position(), restore_state(found, target)
        except DamagedCheckpoint as e:
            say(f"damaged: {e}")
            damaged.append(path)
            continue
        _set_aside(out, damaged)
        say(f"resuming from step {found.step} of {path.parent}")
        return Position(state, found.step, found.meta["tokens"], Place(position, found.config, found.meta["source"]))
    if damaged:
        raise InputError(f"none of the checkpoints in {out / FOLDER} can be read (steps {', '.join(p.name for p in damaged)}, "
                         f"messages above); nothing was changed. To start anew, give another --out")
    return None


def restore_state(found: Checkpoint, target: TrainState) -> TrainState:
    """The training state, laid out as `target` (of `abstract_state`) asks. Raises `DamagedCheckpoint`."""
    items = found.restore({"params": target.params, "opt_state": target.opt_state})
    return TrainState(step=jax.device_put(np.int32(found.step), target.step.sharding), **items)


def _set_aside(out: AnyPath, damaged: list[AnyPath]) -> None:
    for path in damaged if is_primary() else ():
        if tiers.is_local(path, out):
            remove_tree(path)
            say(f"deleted the damaged checkpoint {path} of checkpoint.local")
            continue
        target = out / "damaged" / path.name
        n = 1
        while target.exists():
            n, target = n + 1, out / "damaged" / f"{path.name}-{n}"
        move_step(path, target)
        say(f"moved the damaged checkpoint of step {path.name} to {target}")
    if damaged:
        processes.wait_for_all("damaged checkpoints set aside")
