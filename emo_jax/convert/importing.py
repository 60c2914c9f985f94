"""`emo-jax import`: a published checkpoint -> a run folder with one checkpoint (step 0, parameters only).

Nothing is written before names and shapes of all tensors are known to fit. Tensors then go one by one into
`checkpoints/importing/`, which gets its final name when it is complete (in a bucket, the mark of a complete one); an import
that was stopped goes on from there.
Everything of the published folder that has no place in our config (its config.json, tokenizer and generation files, the
unused router rows of shared experts) is kept in `hugging_face/` beside the checkpoint, so that an export gives it back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax import config as config_lib
from emo_jax import model
from emo_jax.checkpoints import description as description_lib
from emo_jax.checkpoints.checkpoint import finish_step, require_new, unfinished_step
from emo_jax.checkpoints.store import BitSum, Leaf, ParameterStore, leaf_shapes
from emo_jax.config import Config
from emo_jax.convert import description
from emo_jax.convert.layouts import Entry, entries, experts_of_layer, same_elements
from emo_jax.convert.tensors import Reader, read_json
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, copy_file, given_path, remove_tree, shortened, write_json, write_text
from emo_jax.progress import Progress, say

HF_FILES = "hugging_face"
ROUTER_ROWS = "shared_router_rows.npy"  # in HF_FILES: [L, shared experts, D]
NOTE = "imported.json"  # in HF_FILES: the dtype of the published tensors
BATCH_BYTES = 256 * 2**20  # tensors that are written together


def import_checkpoint(source: str, out: str, config_name: str = "", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`source`: a folder with config.json and safetensors files, or with the trainer's state dict in safetensors, for
    which `config_name` says what the model is. Raises `InputError`."""
    folder = given_path(source, "HF_DIR")
    if not folder.exists():
        raise InputError(f"no checkpoint at {source}: no such file or folder")
    reader = Reader(folder)
    published = {}
    later = next((name for name in reader.tensors if name.startswith("blocks.") and ".routed_experts" in name), None)
    if later:
        raise InputError(f"{source} is a state dict of the later trainer ({later}), whose blocks have norms behind attention "
                         f"and experts, ours before them: it cannot be imported")
    if any(name.startswith("blocks.") for name in reader.tensors):
        layout = "olmo_core"
        if not config_name:
            raise InputError(f"{source} is a state dict of the trainer, which does not say how many heads it has; "
                             f"name its config with --config, e.g. --config emo_1b14b_1t")
        config = config_lib.load_config(config_name, list(overrides))
    else:
        where = folder / "config.json"
        published = read_json(where)
        layout, found = description.read_model(published, where)
        if config_name:
            config = config_lib.load_config(config_name, list(overrides))
            description.require_same(config.model, found, config_name, where)
            if found.num_experts and config.router.semantics != (theirs := description.semantics_of(found, published, where)):
                raise InputError(f"config {config_name} has router.semantics={config.router.semantics}; {where} has {theirs}")
        else:
            config = config_lib.override(description.new_config(found, published, _name(folder)), overrides)
    plan = list(entries(layout, config.model))
    _check_names_and_shapes(plan, reader)
    config, tokenizer = _with_tokenizer(config, folder, published)
    target = require_new(out)
    importing = unfinished_step(target, "importing")
    sums = _copy(plan, reader, importing, config)
    _keep(folder, target, plan, reader, config.model.d_model)
    if tokenizer:
        copy_file(tokenizer, target / "tokenizer.json")
    write_text(target / "config.json", config_lib.dumps(config))
    final = _finish(importing, config, sums, reader)
    return {"checkpoint": str(final), "layout": layout, "parameters": model.num_params(config),
            "dtype": "+".join(sorted(reader.dtypes())), "tokenizer": bool(tokenizer), "tensors": len(plan)}


def _check_names_and_shapes(plan: list[Entry], reader: Reader) -> None:
    expected = {e.name: e for e in plan}
    problems = [f"missing {name} {list(e.shape)}" for name, e in expected.items() if name not in reader.tensors]
    problems += [f"unexpected {name} {list(t.shape)}" for name, t in reader.tensors.items() if name not in expected]
    problems += [f"{name} has shape {list(reader.tensors[name].shape)}, expected {list(e.shape)}"
                 for name, e in expected.items() if name in reader.tensors and not _fits(e, reader.tensors[name].shape)]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        shown = "\n  ".join(problems[:20])
        raise InputError(f"{reader.path}: its tensors are not those of its config:\n  {shown}{more}")


def _fits(e: Entry, shape: tuple[int, ...]) -> bool:
    return shape == e.shape or (e.name.startswith("blocks.") and same_elements(shape, e.shape))


def _with_tokenizer(config: Config, folder: AnyPath, published: dict[str, Any]) -> tuple[Config, AnyPath | None]:
    """The config with the end-of-document token of the published tokenizer, if there is one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return config, None
    ids, token = _token_ids(published, folder / "config.json"), None
    if ids:
        vocabulary = _tokens_of(path)
        token = vocabulary.get(ids[0])
        if token is None:
            raise InputError(f"{folder / 'config.json'}: eos_token_id={ids[0]} is no token of {path}")
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, eos_token=token or config.data.eos_token))
    Tokenizer(path, config.data.eos_token)  # readable, and has that token
    return config, path


def published_end_ids(run: AnyPath) -> list[int]:
    """The tokens that end a text by the generation config of an imported model, if it has one."""
    path = run / HF_FILES / "generation_config.json"
    return _token_ids(read_json(path), path) if path.is_file() else []


def _token_ids(published: dict[str, Any], where: AnyPath) -> list[int]:
    """Those of `eos_token_id`: none, one, or a list."""
    ids = published.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{where}: eos_token_id={shortened(repr(ids))} must be token ids")
    return ids


def _tokens_of(path: AnyPath) -> dict[int, str]:
    """The tokens of a tokenizer.json by id, without making a tokenizer."""
    content = read_json(path)
    try:
        known = {i: t for t, i in ((content.get("model") or {}).get("vocab") or {}).items()}
        return known | {t["id"]: t["content"] for t in content.get("added_tokens") or []}
    except (AttributeError, TypeError, KeyError, ValueError):
        raise InputError(f"{path}: not a tokenizer.json (its tokens cannot be read)") from None


# ---- copying --------------------------------------------------------------------------------------------------------


def _copy(plan: list[Entry], reader: Reader, importing: AnyPath, config: Config) -> BitSum:
    """Writes all parameters, in batches, each followed by a note of how far the copy is."""
    shapes = leaf_shapes(config)
    note = importing / "progress.json"
    done, sums = 0, BitSum(shapes)
    identity = {"source": reader.fingerprint(), "model": dataclasses.asdict(config.model)}
    identity = json.loads(json.dumps(identity))
    if note.is_file():
        state = read_json(note)
        kinds = [type(state.get(name)) for name in ("done", "sum", "finite")]
        if state.get("identity") != identity or kinds != [int, int, bool] or not 0 <= state["done"] <= len(plan):
            raise InputError(f"{importing} holds the beginning of another import; delete it or give another --out")
        done, sums = state["done"], BitSum(shapes, state["sum"], state["finite"])
        say(f"resuming the import after {done:,} of {len(plan):,} tensors")
    store = ParameterStore(importing / "params")
    store.create(shapes)
    progress = Progress(f"importing {reader.path}", len(plan), "tensors", first=done)
    for batch in _batches(plan[done:]):
        parts = []
        for e in batch:
            values = e.to_ours(reader.read(e.name).astype(np.float32, copy=False).reshape(e.shape))
            parts.append((e.leaf, e.index, values))
            sums.add(e.leaf, values)
        store.write(parts)
        done += len(batch)
        write_json(note, {"identity": identity, "done": done, "sum": sums.total, "finite": sums.finite})
        progress.update(done)
    store.write(_absent_experts(config, shapes))
    if not sums.finite:
        raise InputError(f"{reader.path}: some tensors hold values that are not finite")
    return sums


def _batches(plan: list[Entry]) -> Iterator[list[Entry]]:
    batch, size = [], 0
    for e in plan:
        batch.append(e)
        size += 4 * int(np.prod(e.shape))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _absent_experts(config: Config, shapes: dict[Leaf, tuple[int, ...]]) -> Iterator[tuple[Leaf, tuple, np.ndarray]]:
    """Zeros for the experts that layers of a pruned model lack (they never run)."""
    m = config.model
    for layer in range(m.num_layers if m.experts_per_layer else 0):
        present = experts_of_layer(m, layer) - m.num_shared_experts
        for row in range(present, m.num_routed_experts):
            for name in ("gate", "up", "down"):
                leaf = ("layers", "moe", name)
                yield leaf, (layer, row), np.zeros(shapes[leaf][2:], np.float32)


# ---- what belongs to a checkpoint besides its parameters ------------------------------------------------------------


def _keep(folder: AnyPath, target: AnyPath, plan: list[Entry], reader: Reader, width: int) -> None:
    """Fills `hugging_face/`."""
    hf_files = target / HF_FILES
    remove_tree(hf_files)
    hf_files.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.is_file() and file.suffix in (".json", ".txt", ".jinja", ".model") and "safetensors" not in file.name:
            copy_file(file, hf_files / file.name)
    dtypes = reader.dtypes()
    write_json(hf_files / NOTE, {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"})
    rows = [reader.read(e.name).astype(np.float32).reshape(-1, width)[-e.dead_rows:] for e in plan if e.dead_rows]
    if rows:
        with (hf_files / ROUTER_ROWS).open("wb") as f:
            np.save(f, np.stack(rows))


def _finish(importing: AnyPath, config: Config, sums: BitSum, reader: Reader) -> AnyPath:
    described = description_lib.describe(config, 0, 0, {"imported": _name(reader.path)}, sums.checksums())
    description_lib.write(importing, described)
    (importing / "progress.json").unlink()
    return finish_step(importing)


def _name(path: AnyPath) -> str:
    """What a folder, or a link to one, is called."""
    return (path.resolve() if isinstance(path, Path) else path).name
