"""What `emo-jax plan` prints and returns."""

from __future__ import annotations

import math
from typing import Any

from emo_jax import chips
from emo_jax.aot import topology as topologies
from emo_jax.config import Config
from emo_jax.plan.calibration import ROWS, Calibration, calibration
from emo_jax.plan.cost import Place
from emo_jax.plan.published import comparisons, derating, kind
from emo_jax.plan.search import MARGIN, Found, Plan

NOTE = ("Times are bounds from a cost model of compiled programs, not measurements: nothing was run. Nothing is added for "
        "compiling, evaluation, checkpoints and restarts.")


def report(config: Config, topology: str, slices: int, found: Found, tokens: float, price: float | None) -> dict[str, Any]:
    name, grid = topologies.parse(topology)
    return {
        "config": config.name, "topology": topology, "slices": slices, "chip": name, "chips": math.prod(grid) * slices,
        "tokens": tokens, "tokens_per_step": config.train.batch_size * config.data.sequence_length,
        "chip_hour_price": price, "memory_margin": MARGIN, "kind": kind(config.model), "derating": derating(config.model),
        "tried": found.tried, "fit": found.fit,
        "plans": [_plan(plan, tokens, price, math.prod(grid) * slices) for plan in found.best],
        "calibration": _calibration(calibration()), "published": _published(), "note": NOTE,
    }


def _plan(plan: Plan, tokens: float, price: float | None, number: int) -> dict[str, Any]:
    cost, fitted, c = plan.cost, calibration().coefficients, plan.config
    steps = tokens / (c.train.batch_size * c.data.sequence_length)

    def total(factor: float) -> dict[str, float | None]:
        hours = steps * plan.seconds / factor / 3600
        return {"days": hours / 24, "chip_hours": hours * number, "cost": price and price * hours * number}

    slow, fast = derating(c.model)
    return {
        "overrides": list(plan.overrides), "mesh": cost.place.mesh, "dispatch": c.kernels.dispatch,
        "microbatches": c.train.microbatches, "remat": c.train.remat,
        "rows_per_device": c.train.batch_size / math.prod(cost.place.mesh.values()),
        "step_seconds": plan.seconds, "mfu": cost.mfu(fitted), "exposed_seconds": cost.exposed_seconds(fitted),
        "memory": plan.memory, "memory_of_chip": cost.place.chip.memory,
        "hardware_over_model_flops": cost.flops / cost.model_flops,
        "collectives": [{"axis": x.axis, "what": x.what, "wire_bytes": x.wire, "seconds": x.seconds, "prefetched": x.prefetched}
                        for x in cost.collectives],
        "bound": total(1.0), "derated": {"fast": total(fast), "slow": total(slow)}, "extrapolated": extrapolated(c, cost.place),
    }


def extrapolated(c: Config, place: Place) -> list[str]:
    """What no row of the calibration has."""
    mesh, slices = place.mesh, {(chips.CHIPS[name], grid) for name, grid in (topologies.parse(row.topology) for row in ROWS)}
    policies = {item.partition("=")[2] for row in ROWS for item in row.overrides if item.startswith("train.remat")}
    found = [f"mesh.{axis} of {mesh[axis]}" for axis in ("data", "tensor", "sequence") if mesh[axis] > 1]
    if mesh["expert"] > 1 and c.kernels.dispatch != "local":
        found.append(f"dispatch {c.kernels.dispatch}")
    found += [what for what, new in (
        ("several slices", place.slices > 1), ("this slice", (place.chip, place.grid) not in slices),
        ("microbatches", c.train.microbatches > 1), (f"remat {c.train.remat}", c.train.remat not in policies),
        ("another shape than 1B/14B", (c.model.num_layers, c.model.num_experts, c.model.d_model) != (16, 128, 2048))) if new]
    return found


def _calibration(c: Calibration) -> dict[str, Any]:
    return {"coefficients": c.coefficients._asdict(), "errors": c.summary(), "rows": [
        {"config": e.row.config, "topology": e.row.topology, "overrides": list(e.row.overrides),
         **{name: getattr(e, name) for name in ("seconds", "memory", "seconds_left_out", "memory_left_out")}}
        for e in c.errors]}


def _published() -> list[dict[str, Any]]:
    return [{"name": c.run.name, "kind": c.run.kind, "topology": c.run.topology, "mfu": c.run.mfu, "bound": c.bound,
             "factor": c.factor, "source": c.run.source} for c in comparisons()]


# ---- for people -----------------------------------------------------------------------------------------------------


def text(r: dict[str, Any], shown: int) -> str:
    slices = f"{r['slices']} x " * (r["slices"] > 1)
    slow, fast = r["derating"]
    priced = r["chip_hour_price"] is not None
    lines = [
        f"{r['config']} for {slices}{r['topology']}: {r['chips']} chips, {r['tokens']:.4g} tokens in "
        f"{r['tokens'] / r['tokens_per_step']:,.0f} steps of {r['tokens_per_step']:,}. {r['tried']:,} plans, of which "
        f"{r['fit']:,} fit; the best of each mesh:",
        "",
        f"  {'step s':>8}  {'MFU':>5}  {'exposed s':>9}  {'memory GB':>9}  {'days':>7}  {'derated':>11}  {'chip-hours':>10}"
        + f"  {'cost':>10}" * priced + "  overrides",
    ]
    for p in r["plans"][:shown]:
        days = f"{p['derated']['fast']['days']:.3g}-{p['derated']['slow']['days']:.3g}"
        lines.append(
            f"  {p['step_seconds']:8.3g}  {p['mfu']:5.1%}  {p['exposed_seconds']:9.2g}  {p['memory'] / 1e9:9.3g}  "
            f"{p['bound']['days']:7.3g}  {days:>11}  {p['bound']['chip_hours']:10,.0f}"
            + (f"  {p['bound']['cost']:10,.0f}" if priced else "") + "  " + " ".join(p["overrides"]))
    best = r["plans"][0]
    fast_total, slow_total = best["derated"]["fast"], best["derated"]["slow"]
    cost = f", {fast_total['cost']:,.0f} to {slow_total['cost']:,.0f} at {r['chip_hour_price']:g} a chip-hour" if priced else ""
    lines += [
        "",
        f"Expect of the first: {fast_total['days']:.3g} to {slow_total['days']:.3g} days, {fast_total['chip_hours']:,.0f} to "
        f"{slow_total['chip_hours']:,.0f} chip-hours{cost}:",
        f"the bound over a derating of {slow:.2f} to {fast:.2f}, measured / predicted MFU of published runs of "
        f"{_a(r['kind'])}.",
        NOTE,
        f"Memory: {r['memory_margin']:.0%} of the chip's {best['memory_of_chip'] / 1e9:.1f} GB stay free. Routing: balanced.",
    ]
    if best["extrapolated"]:
        lines.append(f"The first plan is extrapolated: no program of the fit has {', '.join(best['extrapolated'])}; --verify 1 "
                     "compiles it.")
    return "\n".join([*lines, "", errors(calibration()), "", published()])


def _a(kind: str) -> str:
    return f"a {kind}" if "MoE" in kind else f"{kind} models"


def errors(c: Calibration) -> str:
    """The fit, row by row."""
    lines = [f"The cost model against {len(c.errors)} compiled programs (in brackets: fitted without the row)",
             f"  {'':<16} {'':<12} {'step s':>7}  {'predicted':>16}  {'GB':>6}  {'predicted':>16}"]
    for e in c.errors:
        step, memory = _signed(e.seconds, e.seconds_left_out), _signed(e.memory, e.memory_left_out)
        lines.append(f"  {e.row.config:<16} {e.row.topology:<12} {e.row.seconds:7.3f}  {step:>16}  {e.row.memory / 1e9:6.1f}  "
                     f"{memory:>16}  {' '.join(e.row.overrides)}")
    for what, off in c.summary().items():
        lines.append(f"  {what}: off by {off['mean']:.1%} ({off['mean_left_out']:.1%}) at the mean, {off['largest']:.1%} "
                     f"({off['largest_left_out']:.1%}) at most")
    return "\n".join(lines)


def _signed(fitted: float, left_out: float) -> str:
    return f"{fitted:+.1%} ({left_out:+.1%})"


def published() -> str:
    lines = ["Published runs (MFU in bf16), and the bound that this model predicts for their shapes"]
    lines += [f"  {c.run.name:<16} {c.run.kind:<16} {c.run.topology:<12} measured {c.run.mfu:.1%}, predicted {c.bound:.1%}: "
              f"factor {c.factor:.2f}" for c in comparisons()]
    return "\n".join(lines)
