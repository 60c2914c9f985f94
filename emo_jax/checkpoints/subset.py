"""A subset: which routed experts of every layer are kept. A small JSON file, made by `emo-jax select`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emo_jax import buckets
from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, given_path, reason, shortened, write_result

VERSION = 1
MAX_EXPERTS = 1 << 20  # a file with more is damaged


@dataclass(frozen=True)
class Subset:
    """Shared experts are always kept and have no ids here; numbers of experts count them, as in the published pipeline."""

    kept: tuple[tuple[int, ...], ...]  # routed expert ids of every layer, ascending
    num_routed: int  # in the whole model
    num_shared: int
    method: str
    calibration: dict[str, Any] = field(default_factory=dict)  # path, hash, documents, tokens, document_hashes
    scores: tuple[tuple[float, ...], ...] | None = None  # [L, R], what the experts were ranked by
    model: dict[str, Any] = field(default_factory=dict)  # name, step, hash: the checkpoint it was chosen for

    @property
    def experts_per_layer(self) -> list[int]:
        """Experts of every layer, shared ones included."""
        return [len(ids) + self.num_shared for ids in self.kept]

    @property
    def share(self) -> float:
        """The kept part of all experts."""
        return sum(self.experts_per_layer) / (len(self.kept) * (self.num_routed + self.num_shared))

    def mask(self) -> np.ndarray:
        """bool [L, R], the `allowed` of `model.forward`."""
        mask = np.zeros((len(self.kept), self.num_routed), bool)
        for layer, ids in enumerate(self.kept):
            mask[layer, list(ids)] = True
        return mask

    def score_array(self) -> np.ndarray:
        """float [L, R]. Raises `InputError` if the file has none."""
        if self.scores is None:
            raise InputError(f"a subset of method {self.method} holds no scores of the experts; choose it by another "
                             f"method (emo-jax select --method router)")
        return np.asarray(self.scores, np.float64)

    def with_mask(self, mask: np.ndarray, **changes: Any) -> Subset:
        return dataclasses.replace(self, kept=kept_of(mask), **changes)

    def describe(self) -> dict[str, Any]:
        """For a command's result."""
        calibration = {k: v for k, v in self.calibration.items() if k != "document_hashes"}
        return {"keep": self.experts_per_layer, "share": self.share, "method": self.method, "calibration": calibration,
                "model": self.model}

    def summary(self) -> str:
        counts = sorted(set(self.experts_per_layer))
        each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return (f"{each} of {self.num_routed + self.num_shared} experts in each of {len(self.kept)} layers "
                f"({self.share:.1%}; {self.num_shared} shared) by {self.method}")

    def save(self, path: str | AnyPath) -> None:
        """Writes the file in one step. Raises `InputError` if it cannot be written."""
        content = {"version": VERSION, "keep": self.experts_per_layer} | dataclasses.asdict(self)
        if self.scores is not None:
            content["scores"] = [[float(f"{s:.7g}") for s in row] for row in self.scores]
        write_result(path, content)


def kept_of(mask: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in mask)


def full(config: Config) -> Subset:
    m = config.model
    everything = tuple(tuple(range(m.num_routed_experts)) for _ in range(m.num_layers))
    return Subset(everything, m.num_routed_experts, m.num_shared_experts, "full")


def load(path: str | AnyPath, of: Checkpoint | Config | None = None) -> Subset:
    """Reads a subset file and checks it: its form, and that it is one of this checkpoint or shape of model. Raises
    `InputError`."""
    subset = _read(path)
    return subset if of is None else require_of(subset, of, str(path))


def open_subset(subset: Subset | str | AnyPath, of: Checkpoint | Config) -> Subset:
    """The subset, from its file where it is one, if it is one of this checkpoint or shape of model. Raises `InputError`."""
    return require_of(subset, of) if isinstance(subset, Subset) else load(subset, of)


# The fields of a file: whether one must be there, what it must be, and the test of that.
_FIELDS: dict[str, tuple[bool, str, Callable[[Any], bool]]] = {
    "num_routed": (True, "the model's number of routed experts", lambda x: type(x) is int and 0 < x <= MAX_EXPERTS),
    "num_shared": (True, "the model's number of shared experts", lambda x: type(x) is int and 0 <= x <= MAX_EXPERTS),
    "method": (True, "a string", lambda x: type(x) is str),
    "kept": (True, "a list of expert ids for each layer", lambda x: type(x) is list and len(x) > 0),
    "scores": (False, "null or a list of numbers for each layer", lambda x: x is None or type(x) is list),
    "calibration": (False, "an object with the list of strings document_hashes and the list of objects subsets, each with "
                    "coverage from 0 to 1", lambda x: type(x) is dict and _is_strings(x.get("document_hashes", []))
                    and _is_parts(x.get("subsets", []))),
    "model": (False, "an object with the string hash", lambda x: type(x) is dict and type(x.get("hash", "")) is str),
}


def _is_strings(x: Any) -> bool:
    return type(x) is list and all(type(s) is str for s in x)


def _is_parts(x: Any) -> bool:
    number = lambda share: type(share) in (int, float) and 0 <= share <= 1 + 1e-6
    return type(x) is list and all(type(part) is dict and number(part.get("coverage", 0)) for part in x)


def _read(path: str | AnyPath) -> Subset:
    where = f"subset {shortened(str(path))}"

    def require(ok: bool, field: str, value: Any, allowed: str) -> None:
        if not ok:
            raise InputError(f"{where}: {field}={shortened(json.dumps(value))} must be {allowed}; expected a file of "
                             f"`emo-jax select --out`")

    try:
        text = given_path(path, "subset").read_bytes().decode()
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, *buckets.errors(path)) as e:
        raise InputError(f"{where}: cannot be read ({reason(e)})") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({e}); expected a file of `emo-jax select --out`") from None
    version = content.get("version") if isinstance(content, dict) else None
    require(type(version) is int and version == VERSION, "version", version, str(VERSION))
    values: dict[str, Any] = {name: content[name] for name in _FIELDS if name in content}
    for name, (needed, allowed, holds) in _FIELDS.items():
        if needed and name not in values:
            raise InputError(f"{where}: field {name!r} is missing")
        require(name not in values or holds(values[name]), name, values.get(name), allowed)
    layers, routed = len(values["kept"]), values["num_routed"]
    for layer, ids in enumerate(values["kept"]):
        require(type(ids) is list and all(type(i) is int and 0 <= i < routed for i in ids)
                and ids == sorted(set(ids)),  # ty: ignore[invalid-argument-type]
                f"kept[{layer}]", ids, f"ascending expert ids in 0..{routed - 1}")
    if (scores := values.get("scores")) is not None:
        require(len(scores) == layers, "scores", scores, f"null or one list for each of the {layers} layers of kept")
        for layer, row in enumerate(scores):
            require(type(row) is list and len(row) == routed and all(
                type(s) in (int, float) and abs(s) < 1e300 for s in row),
                f"scores[{layer}]", row, f"{routed} finite numbers (num_routed={routed})")
        values["scores"] = tuple(map(tuple, scores))
    values["kept"] = tuple(map(tuple, values["kept"]))
    return Subset(**values)


def require_fits(subset: Subset, config: Config, where: str) -> None:
    """Raises `InputError` unless the subset is one of this shape of model."""
    m = config.model
    require_experts(config)
    have = (len(subset.kept), subset.num_routed, subset.num_shared)
    want = (m.num_layers, m.num_routed_experts, m.num_shared_experts)
    if have != want:
        raise InputError(f"subset {where} is of a model with {have[0]} layers, {have[1]} routed and {have[2]} shared "
                         f"experts; {config.name} has {want[0]}, {want[1]} and {want[2]}")
    require_enough([len(ids) for ids in subset.kept], config, where)


def require_enough(routed: Iterable[int], config: Config, where: str) -> None:
    """Raises `InputError` for a layer with too few or too many kept routed experts.

    Below the experts of a token, `emo_v1` gives the missing ones weight 0 (keep-8 of the published models has 7);
    the weights of `emo_v2` would be scaled for experts that are not there.
    """
    m = config.model
    least = 1 if config.router.semantics == "emo_v1" else m.routed_top_k
    for layer, n in enumerate(routed):
        if not least <= n <= m.num_routed_experts:
            raise InputError(f"{where}: layer {layer} keeps {n + m.num_shared_experts} experts; it must be between "
                             f"{least + m.num_shared_experts} and {m.num_experts} "
                             f"({m.num_shared_experts} shared included)")


def require_experts(config: Config) -> None:
    if not config.model.num_experts:
        raise InputError(f"{config.name} is a dense model (model.num_experts=0): it has no experts to choose from")


def require_of(subset: Subset, of: Checkpoint | Config, where: str = "given here") -> Subset:
    """The subset. Raises `InputError` unless it is one of this shape of model and, of a checkpoint, was chosen for its
    parameters, or for those of the model into which `surgery.merge` put what it had learnt."""
    require_fits(subset, of if isinstance(of, Config) else of.config, where)
    if isinstance(of, Checkpoint) and subset.model.get("hash") not in (None, of.hash, _merged_into(of)):
        raise InputError(f"subset {where} was chosen for {subset.model.get('name')} step {subset.model.get('step')}, whose "
                         f"parameters are others than those of {of.path}; choose one for this checkpoint")
    return subset


def _merged_into(found: Checkpoint) -> str | None:
    """The hash of the model that `found` is, but for what a subset of it has learnt."""
    made = found.meta.get("made", {})
    return made["of"]["hash"] if "merged" in made else None
