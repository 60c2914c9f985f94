"""The best plans, compiled, beside what was predicted of them.

A program whose devices exchange rows counts its buffers as full, which balanced routing leaves partly empty: so does the
prediction here (`counted_seconds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emo_jax.aot import compile as aot
from emo_jax.plan.search import Plan


def verify(plans: Sequence[Plan], topology: str, slices: int) -> list[dict[str, Any]]:
    """Needs libtpu; minutes each. A plan that the compiler refuses has an `error` instead of numbers."""
    from jax.errors import JaxRuntimeError

    found = []
    for plan in plans:
        counted = plan.seconds + plan.cost.unfilled_seconds
        one: dict[str, Any] = {"overrides": list(plan.overrides), "predicted": {
            "step_seconds": plan.seconds, "counted_seconds": counted, "memory": plan.memory}}
        try:
            r = aot.compile_config(plan.config, topology, slices)
            one["compiled"] = {"step_seconds": r["bounds"]["step_seconds_roofline"], "memory": r["memory"]["peak"],
                               "exposed_seconds": r["bounds"]["exposed_seconds"], "fits": r["memory"]["fits"]}
        except JaxRuntimeError as e:
            one["error"] = str(e).splitlines()[0]
        found.append(one)
    return found


def text(verified: Sequence[dict[str, Any]]) -> str:
    lines = ["Compiled"]
    for one in verified:
        p = one["predicted"]
        if c := one.get("compiled"):
            said = (f"step {c['step_seconds']:.3f} s (predicted {p['counted_seconds'] / c['step_seconds'] - 1:+.1%}), memory "
                    f"{c['memory'] / 1e9:.1f} GB (predicted {p['memory'] / c['memory'] - 1:+.1%})")
            if p["counted_seconds"] > p["step_seconds"]:
                said += f", of the step {p['counted_seconds'] - p['step_seconds']:.3f} s for empty lines of full buffers"
            said += "  DOES NOT FIT" * (not c["fits"])
        else:
            said = f"the compiler refuses it: {one['error']}"
        lines.append(f"  {said}  {' '.join(one['overrides'])}")
    return "\n".join(lines)
