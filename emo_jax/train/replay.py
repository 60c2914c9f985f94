"""A step of a run once more, from the checkpoint before it, and taken apart. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emo_jax import compat, processes, sharding
from emo_jax.checkpoints.checkpoint import FOLDER, open_checkpoint, read_step, steps
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.config import Config, override
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, folder_path
from emo_jax.phases import phases
from emo_jax.progress import say, track
from emo_jax.train import start
from emo_jax.train.apart import take_apart
from emo_jax.train.bad_steps import Verdict
from emo_jax.train.batches import DocumentsOfPhases, batches_of
from emo_jax.train.loop import enter
from emo_jax.train.metrics import METRICS, PER_LAYER, SCALARS, finite_or_null, records_and_foreign_lines
from emo_jax.train.replicas import RepeatCheck
from emo_jax.train.rollback import SkippedRows
from emo_jax.train.run_folder import CONFIG, TOKENIZER, read_config
from emo_jax.train.step import Batch, TrainState, make_train_step

WORDS = 16  # tokens that are shown of a document


class Before(NamedTuple):
    """Everything that a step is made of."""

    config: Config  # of its phase
    state: TrainState
    batch: Batch
    documents: start.Documents
    labels: list[str]
    restored: int  # the step of the checkpoint


def replay(run: str | AnyPath, step: int, times: int = 1, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Step `step` (1 is the first) of the run in the folder `run`: its numbers beside those that were recorded, the loss of
    every row and label, the documents, the gradient norms and the router's state. times: that its gradients are computed and
    compared, bit for bit. overrides: of the run's config, such as another mesh. Raises `InputError`."""
    folder = folder_path(run, "RUN")
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise InputError(f"{run} is no run's folder: it has no {name}")
    config = override(read_config(folder / CONFIG), [*overrides, f"data.tokenizer={folder / TOKENIZER}"])
    if not 1 <= step <= config.train.steps:
        raise InputError(f"--step {step}: expected 1 to {config.train.steps}, the steps of {run}")
    mesh = sharding.make_mesh(config)
    with compat.set_mesh(mesh):
        before = _just_before(config, mesh, folder, step)
        eos_id = before.documents.tokenizer.eos_id
        repeats = None
        if times > 1:
            different = RepeatCheck(before.config, mesh, eos_id).different(times, before.state, before.batch)
            repeats = {"times": times, "identical": not different, "different": different}
        apart = jax.jit(take_apart(before.config, mesh, eos_id))(before.state.params, before.batch, before.state.step)
        norms, rows = _norms(apart.gradients), _rows(before, processes.gather_global(apart.rows))
        del apart
        _, metrics = make_train_step(before.config, mesh, eos_id)(before.state, before.batch)
        metrics = jax.device_get(metrics)
    if "expert_load_max" in metrics:
        metrics["experts_max_load"] = metrics["expert_load_max"].max()
    numbers = {name: np.asarray(metrics[name], np.float64).tolist() for name in (*SCALARS, *PER_LAYER) if name in metrics}
    verdict = Verdict(*metrics["verdict"].tolist())
    return finite_or_null({
        "run": str(folder), "step": step, "restored_from": before.restored, "numbers": numbers,
        "recorded": _compare(folder, step, numbers), "skipped": bool(verdict.skipped), "window": verdict._asdict(),
        "rows": rows, "loss_by_label": _by_label(rows), "gradient_norms": norms, "repeats": repeats})


def _just_before(config: Config, mesh: Mesh, folder: AnyPath, step: int) -> Before:
    """Restores, and takes the steps in between."""
    documents = DocumentsOfPhases(folder)
    position = _restored(config, mesh, folder, step, documents)
    state, place, skipped = start.with_reference(position.state, config, mesh), position.place, SkippedRows(folder)
    between = iter(track(range(position.step + 1, step + 1), "repeating steps", "steps"))
    for phase in (phase for phase in phases(config) if phase.until > position.step):
        c, of_phase = phase.config, documents.of(phase.config)
        state = enter(phase, state, max(position.step, phase.first_step))
        batches = batches_of(config, phase, documents, processes.row_group(mesh, c.train.batch_size), place)
        train_step = make_train_step(c, mesh, of_phase.tokenizer.eos_id)
        try:
            for number in between:
                for _ in range(skipped.before(number)):
                    next(batches)
                batch = sharding.global_batch(mesh, next(batches))
                if number == step:
                    return Before(c, state, batch, of_phase, batches.labels, position.step)
                state, _ = train_step(state, batch)
                if number == phase.until:
                    break
            place = start.Place(batches.position(), c, of_phase.fingerprint)
        finally:
            batches.close()
    raise AssertionError(f"no phase has step {step}")


def _restored(config: Config, mesh: Mesh, folder: AnyPath, step: int, documents: DocumentsOfPhases) -> start.Position:
    """The newest checkpoint that can be read before `step`, or the start of the run."""
    for found_step in reversed([s for s in steps(folder / FOLDER) if s < step]):
        try:
            found = read_step(folder / FOLDER / str(found_step))
            start.require_goes_on(found, config)
            start.require_documents(found, config, documents.of)
            state = start.restore_state(found, start.abstract_state(config, mesh))
        except DamagedCheckpoint as e:
            say(f"damaged: {e}")
            continue
        return start.Position(state, found_step, found.meta["tokens"],
                              start.Place(found.position(), found.config, found.meta["source"]))
    origin = open_checkpoint(config.train.init_from) if config.train.init_from else None
    if origin is not None and origin.step >= step:
        raise InputError(f"--step {step}: the run began after step {origin.step}")
    return start.initial_position(config, mesh, origin, documents.of)


# ---- what it shows --------------------------------------------------------------------------------------------------


def _norms(gradients: Any) -> dict[str, Any]:
    """Of every parameter, by layer where there are layers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        names = [k.key for k in path]
        squares = jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim)) if names[0] == "layers" else None)
        found[".".join(names)] = np.sqrt(np.asarray(squares, np.float64)).tolist()
    return found


def _rows(before: Before, nats_BT: np.ndarray) -> list[dict[str, Any]]:
    """Loss and documents of every row, the highest loss first."""
    batch = {name: processes.gather_global(a) for name, a in before.batch.items()}
    nats_B, tokens_B = nats_BT.sum(axis=1), batch["loss_weights"].sum(axis=1)
    found = []
    for row, (nats, tokens) in enumerate(zip(nats_B, tokens_B)):
        documents = []
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            here = np.flatnonzero(batch["segment_ids"][row] == segment)
            number, weight = int(batch["document_ids"][row, here[0]]), batch["loss_weights"][row, here].sum()
            documents.append({
                "document": number, "label": before.documents.source.label(number), "tokens": len(here),
                "nats": float(nats_BT[row, here].sum()), "loss_tokens": float(weight),
                "text": before.documents.tokenizer.decode(batch["tokens"][row, here[:WORDS]])})
        found.append({"row": row, "loss": float(nats / tokens) if tokens else 0.0, "loss_tokens": float(tokens),
                      "documents": documents})
    return sorted(found, key=lambda r: -r["loss"] if np.isfinite(r["loss"]) else -np.inf)


def _by_label(rows: list[dict[str, Any]]) -> dict[str, float]:
    sums: dict[str, np.ndarray] = {}
    for document in (d for row in rows for d in row["documents"]):
        sums[document["label"]] = sums.get(document["label"], 0) + np.array([document["nats"], document["loss_tokens"]])
    return {label: float(nats / tokens) for label, (nats, tokens) in sorted(sums.items()) if tokens}


def _compare(folder: AnyPath, step: int, numbers: dict[str, Any]) -> dict[str, Any] | None:
    """With what the run recorded: {name: [recorded, replayed]} of what is not the same to the last bit; None: not recorded."""
    path = folder / METRICS
    records, _ = records_and_foreign_lines(path.read_bytes() if path.is_file() else b"")
    record = next((r for r in records if r["step"] == step and "eval" not in r), None)
    if record is None:
        return None
    replayed = finite_or_null(numbers)
    different = {name: [record[name], replayed[name]] for name in replayed if name in record and record[name] != replayed[name]}
    return {"compared": [name for name in replayed if name in record], "different": different}


def report(result: dict[str, Any], shown: int = 8) -> str:
    """For a person; the JSON has all rows."""
    n = result["numbers"]
    lines = [f"step {result['step']} of {result['run']}, from the checkpoint of step {result['restored_from']}: loss "
             f"{_number(n['loss'])}, gradient norm {_number(n['grad_norm'])}; {'' if result['skipped'] else 'not '}skipped"]
    w = result["window"]
    lines.append(f"  before it: loss {_number(w['loss_mean'])} with standard deviation {_number(w['loss_std'])}, gradient norm "
                 f"{_number(w['grad_norm_mean'])} with {_number(w['grad_norm_std'])}")
    if result["recorded"] is None:
        lines.append(f"  {METRICS} has no record of it")
    elif not (different := result["recorded"]["different"]):
        lines.append(f"  bit for bit what {METRICS} has ({len(result['recorded']['compared'])} numbers)")
    else:
        lines.append(f"  not what {METRICS} has: " + ", ".join(f"{k} {a} there, {b} now" for k, (a, b) in different.items()))
    if r := result["repeats"]:
        lines.append(f"  computed {r['times']} times: {r['different'] or 'the same bits'}")
    lines += ["by label: " + "  ".join(f"{k} {v:.4f}" for k, v in result["loss_by_label"].items()), "rows, highest loss first:"]
    for row in result["rows"][:shown]:
        lines.append(f"  row {row['row']}: loss {_number(row['loss'])} over {row['loss_tokens']:.0f} tokens")
        lines += [f"    document {d['document']} ({d['label']}), {d['tokens']} tokens: {d['text']!r}"
                  for d in row["documents"][:4]]
    lines.append("gradient norms, by layer where there are layers:")
    for name, value in result["gradient_norms"].items():
        lines.append(f"  {name:<24}" + " ".join(map(_number, value if isinstance(value, list) else [value])))
    routers = [name for name in PER_LAYER if name in n]
    lines += ["by layer:", *(f"  {name:<24}" + " ".join(map(_number, n[name])) for name in routers)]
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.4g}"


