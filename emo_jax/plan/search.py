"""The meshes, microbatches and rematerialisation policies that a config could run with on a slice, and the best of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emo_jax import chips
from emo_jax.aot import topology as topologies
from emo_jax.config import Config, mesh_shape, override
from emo_jax.errors import InputError
from emo_jax.model import SAVED
from emo_jax.plan.calibration import calibration
from emo_jax.plan.cost import Cost, Place, cost

MARGIN = 0.1  # of the chip's memory stays free: about what the cost model is off by, and what a run needs beside its step
ENUMERATED = ("data", "fsdp", "expert", "tensor")  # mesh.sequence stays the config's
KEYS = (*(f"mesh.{axis}" for axis in ENUMERATED), "kernels.dispatch", "train.microbatches", "train.remat")


class Plan(NamedTuple):
    overrides: tuple[str, ...]  # of the config's file: those that were given, and what of KEYS differs
    base: Config
    cost: Cost

    @property
    def config(self) -> Config:
        return override(self.base, self.overrides)

    @property
    def seconds(self) -> float:
        return self.cost.seconds(calibration().coefficients)

    @property
    def memory(self) -> float:
        return self.cost.memory(calibration().coefficients)

    @property
    def fits(self) -> bool:
        return self.memory <= (1 - MARGIN) * (self.cost.place.chip.memory or math.inf)


class Found(NamedTuple):
    best: list[Plan]  # of every mesh and dispatch strategy the fastest that fits, fastest first
    tried: int
    fit: int


def search(config: Config, topology: str, slices: int = 1, given: Sequence[str] = ()) -> Found:
    """`given`: overrides that `config` has already; their fields stay. Raises `InputError` where nothing fits, and says what
    would."""
    plans = list(_plans(config, topology, slices, given))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise InputError(_what_would_fit(config, topology, slices, given, plans))
    best: dict[tuple, Plan] = {}
    for plan in sorted(fitting, key=lambda plan: (plan.seconds, plan.memory)):
        best.setdefault((*plan.cost.place.mesh.items(), plan.cost.dispatch), plan)
    return Found(list(best.values()), len(plans), len(fitting))


def meshes(grid: tuple[int, ...], sequence: int = 1) -> Iterator[dict[str, int]]:
    """The axis sizes (of `ENUMERATED`) that whole torus axes make: JAX splits none of them, except on slices of a host or two.
    `grid`: devices along each."""
    seen = set()
    for places in itertools.product(range(len(ENUMERATED) + 1), repeat=len(grid)):
        *sizes, along = (math.prod(n for n, at in zip(grid, places) if at == axis) for axis in range(len(ENUMERATED) + 1))
        if along == sequence and tuple(sizes) not in seen and _assigned(grid, (*sizes, along)):
            seen.add(tuple(sizes))
            yield dict(zip(ENUMERATED, sizes))


def _assigned(grid: tuple[int, ...], sizes: Sequence[int]) -> bool:
    """Whether JAX, which begins with the last axis and takes as many torus axes as it can for each, finds room for all."""
    left = list(grid)
    for size in (n for n in reversed(sizes) if n > 1):
        subsets = (chosen for number in range(len(left), 0, -1) for chosen in itertools.combinations(range(len(left)), number))
        taken = next((chosen for chosen in subsets if math.prod(left[i] for i in chosen) == size), None)
        if taken is None:
            return False
        left = [n for i, n in enumerate(left) if i not in taken]
    return True


def _plans(config: Config, topology: str, slices: int, given: Sequence[str]) -> Iterator[Plan]:
    """Every valid one, with more microbatches only where fewer do not fit: they cost time. Raises `InputError` if none is."""
    fixed = _fields(given)
    name, grid = topologies.parse(topology)
    chip, refused, some = chips.CHIPS[name], None, False
    devices = (*grid, chip.devices) if chip.devices > 1 else grid
    as_it_is = {key: str(functools.reduce(getattr, key.split("."), config)) for key in KEYS}
    axes = {axis: n for axis, n in dataclasses.asdict(config.mesh).items() if f"mesh.{axis}" in fixed and n != -1}
    sizes = list(meshes(devices, config.mesh.sequence))
    sizes += [split for each in sizes if (split := _of_whole_experts(config, each)) not in sizes]
    sizes.sort(key=lambda sizes: -sizes["fsdp"])
    sizes = [each for each in sizes if all(each.get(axis, n) == n for axis, n in axes.items())]
    for mesh in sizes:
        valid = []
        for microbatches in _microbatches(config, fixed):
            try:
                cut = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh),
                                          train=dataclasses.replace(config.train, microbatches=microbatches))
                shape = mesh_shape(cut, math.prod(devices) * slices, slices)
                valid.append((cut, Place(chip, grid, shape, slices, name not in chips.WITHOUT_SPARSE_CORES)))
            except InputError as e:
                refused = refused or e
        for dispatch in _dispatches(config, mesh["expert"], name, fixed):
            for remat in [config.train.remat] if "train.remat" in fixed else SAVED:
                for cut, where in valid:
                    choice = zip(KEYS, (*mesh.values(), dispatch, cut.train.microbatches, remat))
                    changed = tuple(f"--{key}={value}" for key, value in choice if str(value) != as_it_is[key])
                    found, some = Plan((*given, *changed), config, cost(cut, where, dispatch, remat)), True
                    yield found
                    if found.fits:
                        break
    if not some:
        raise refused or InputError(f"no mesh of {topology} has {', '.join(f'mesh.{a}={n}' for a, n in axes.items())}: every "
                                    f"axis must be a product of whole torus axes, of {' x '.join(map(str, devices))} devices")


def _of_whole_experts(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh with part of `fsdp` as `data`, so that its devices hold whole experts, where they held parts of one: parts are
    gathered with a copy, and most reductions of their gradients become all-reduces."""
    shards = sizes["fsdp"] * sizes["expert"]
    k = shards // math.gcd(shards, config.model.num_experts) if config.model.num_experts else 1
    return sizes | {"data": sizes["data"] * k, "fsdp": sizes["fsdp"] // k} if sizes["fsdp"] % k == 0 else sizes


def _dispatches(config: Config, expert: int, chip: str, fixed: Sequence[str]) -> list[str]:
    if "kernels.dispatch" in fixed:
        return [config.kernels.dispatch]
    # local over two axes is one more way to run the gathers of fsdp, for chips that cannot run them beside the computation.
    return ["auto"] if expert == 1 else ["ring", "all_to_all", *["local"] * (chip in chips.WITHOUT_SPARSE_CORES)]


def _microbatches(config: Config, fixed: Sequence[str]) -> list[int]:
    rows = config.train.batch_size
    return [config.train.microbatches] if "train.microbatches" in fixed else [n for n in range(1, rows + 1) if rows % n == 0]


def _fields(given: Sequence[str]) -> list[str]:
    return [item.removeprefix("--").partition("=")[0] for item in given]


def _what_would_fit(config: Config, topology: str, slices: int, given: Sequence[str], plans: list[Plan]) -> str:
    least = min(plans, key=lambda plan: plan.memory)
    chip = least.cost.place.chip
    said = (f"nothing fits: of {len(plans)} plans of {config.name} on {topology} the smallest "
            f"({' '.join(least.overrides) or 'as it is'}) needs {least.memory / 1e9:.1f} GB of a device's "
            f"{(chip.memory or 0) / 1e9:.1f} GB, of which {MARGIN:.0%} stay free")
    fixed = _fields(given)
    kept = [key for key in ("train.microbatches", "train.remat") if key in fixed]
    if kept and any(plan.fits for plan in _plans(config, topology, slices, [key for key in fixed if key not in kept])):
        return f"{said}; without {' and '.join(f'--{key}' for key in kept)} there are plans that fit"
    name, grid = topologies.parse(topology)
    while math.prod(grid) < 2**14:
        grid = _doubled(grid)
        larger = f"{name}:{'x'.join(map(str, grid))}"
        try:
            if any(plan.fits for plan in _plans(config, larger, slices, [key for key in fixed if not key.startswith("mesh.")])):
                return f"{said}; {larger} ({math.prod(grid)} chips{' a slice' * (slices > 1)}) would do"
        except InputError:
            break
    return f"{said}; more chips of this kind do not help: take chips with more memory, or a smaller model or batch"


def _doubled(grid: tuple[int, ...]) -> tuple[int, ...]:
    at = grid.index(min(grid))
    return tuple(sorted(2 * n if i == at else n for i, n in enumerate(grid)))
