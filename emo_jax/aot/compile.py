"""`emo-jax compile`: the training step of a config, compiled for TPUs or GPUs that are not there (or the devices that are),
and what the compiled program says of its memory, FLOPs, collectives, and the bounds of its speed.

Nothing is executed. Bytes, counts, FLOPs and memory are the program's; seconds are bounds and estimates (see
`aot.schedule`), to compare programs with, not to promise.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from emo_jax.config import Config
from emo_jax.errors import InputError

NOTE = "Seconds are bounds computed from the compiled program and the chip's peak rates, not measurements: nothing was run."


def compile_config(config: Config, topology: str | None, slices: int = 1) -> dict[str, Any]:
    """The report, for so many slices of `topology` or for this process's own devices."""
    if slices < 1 or (slices > 1 and topology is None):
        raise InputError(f"--slices {slices} must be at least 1, and takes a --topology")
    if topology is not None:
        from emo_jax.aot import topology as topologies

        topologies.parse(topology, gpus=True)
        topologies.without_devices()
        devices = topologies.devices(topology, slices)
    else:
        import jax

        devices = jax.devices()
    compiled, seconds = compile_step(config, devices)
    return report(config, devices, compiled) | {"topology": topology or "local", "compile_seconds": seconds}


def compile_step(config: Config, devices: Sequence[Any]) -> tuple[Any, float]:
    """(the compiled training step, seconds)."""
    import jax
    import jax.numpy as jnp

    from emo_jax import sharding
    from emo_jax.train import step

    mesh = sharding.make_mesh(config, devices)
    shape = (config.train.batch_size, config.data.sequence_length)
    fields = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "document_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "loss_weights" else jnp.int32,
                                        sharding=sharding.batch_sharding(mesh)) for name in fields}
    start = time.monotonic()
    compiled = step.make_train_step(config, mesh).lower(step.abstract_state(config, mesh), batch).compile()
    return compiled, time.monotonic() - start


def report(config: Config, devices: Sequence[Any], compiled: Any) -> dict[str, Any]:
    from emo_jax import chips, sharding
    from emo_jax.aot.hlo import Module
    from emo_jax.aot.schedule import schedule
    from emo_jax.train.flops import flops_per_token

    name = chips.chip_name(devices[0].device_kind)
    known = name is not None and chips.CHIPS[name].link is not None
    # Without known rates times mean nothing, but counts do not need them.
    chip = chips.CHIPS[name] if known else chips.Chip(1.0, chips.CHIPS[name].memory if name else None, 1.0, 1.0)
    slices = len(sharding.slices_of(devices))
    memory = compiled.memory_analysis()
    walked = schedule(Module(compiled.as_text()), chip, _grid(devices), slices, len(devices) // slices if slices > 1 else 0)
    tokens = config.train.batch_size * config.data.sequence_length
    model_flops = flops_per_token(config) * tokens / len(devices)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if devices[0].platform == "tpu":  # whose temporaries count what lies unused between buffers a second time
        peak = memory.peak_memory_in_bytes
    return {
        "config": config.name, "devices": len(devices), "chip": name or devices[0].device_kind,
        "slices": slices, "mesh": {axis: n for axis, n in sharding.make_mesh(config, devices).shape.items() if n > 1},
        "rows_per_device": config.train.batch_size / len(devices), "microbatches": config.train.microbatches,
        "tokens_per_step": tokens, "remat": config.train.remat,
        "memory": {"arguments": arguments, "temporaries": temporaries, "outputs": memory.output_size_in_bytes,
                   "peak": peak, "of_chip": chip.memory, "fits": peak <= chip.memory if chip.memory else None},
        "flops": {"model": model_flops, "hardware": walked.flops},
        "moved_bytes": walked.moved_bytes,
        "collectives": [dataclasses.asdict(c) | ({} if known else {"seconds": None, "exposed_seconds": None})
                        for c in walked.collectives],
        "kernels": {kernel: {"calls": n, "seconds": s if known else None} for kernel, (n, s) in walked.kernels.items()},
        "bounds": _bounds(walked, chip, model_flops) if known else None,
        "gaps": [dataclasses.asdict(gap) for gap in walked.gaps[:10]] if known and chip.clock else [],
        "unknown_loops": walked.unknown_loops,
    }


def _grid(devices) -> tuple[int, ...]:
    """Devices along each torus axis."""
    places = [getattr(device, "coords", (0,)) for device in devices]
    return tuple(len(set(along)) for along in zip(*places) if len(set(along)) > 1)


def _bounds(walked, chip, model_flops) -> dict[str, float | None]:
    step = walked.roofline_seconds + walked.exposed_seconds
    cycles = walked.cycles_seconds + walked.exposed_seconds if chip.clock else None
    ideal = model_flops / chip.flops
    return {
        "compute_seconds": walked.flops / chip.flops, "memory_seconds": walked.moved_bytes / chip.bandwidth,
        "interconnect_seconds": sum(c.seconds for c in walked.collectives), "exposed_seconds": walked.exposed_seconds,
        "ideal_seconds": ideal, "step_seconds_roofline": step, "step_seconds_cycles": cycles,
        "mfu_roofline": ideal / step, "mfu_cycles": ideal / cycles if cycles else None,
    }


def text(r: dict[str, Any]) -> str:
    """The report for people."""
    m, f, b = r["memory"], r["flops"], r["bounds"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items()) or "one device"
    slices = f"{r['slices']} x " * (r["slices"] > 1)
    lines = [
        f"{r['config']} for {slices}{r['topology']}: {r['devices']} x {r['chip']}, mesh {mesh}, {r['rows_per_device']:g} rows "
        f"a device in {r['microbatches']} microbatches, {r['tokens_per_step']:,} tokens a step, remat {r['remat']}",
        f"compiled in {r['compile_seconds']:.0f} s",
        f"memory of a device   {m['peak'] / 1e9:.2f} GB" + (f" of {m['of_chip'] / 1e9:.1f}" if m["of_chip"] else "")
        + f" (arguments {m['arguments'] / 1e9:.2f}, temporaries {m['temporaries'] / 1e9:.2f})"
        + ("" if m["fits"] is not False else "  DOES NOT FIT"),
        f"FLOPs of a device    {f['model']:.3e} of the model, {f['hardware']:.3e} of the program "
        f"({f['hardware'] / f['model']:.2f} x)",
        "collectives          count  payload GB  on the wire GB  asynchronous  exposed ms",
    ]
    for c in r["collectives"]:
        exposed = f"{1e3 * c['exposed_seconds']:10.1f}" if b else "         -"
        lines.append(f"  {c['kind']:<18} {c['count']:>5}  {c['payload_bytes'] / 1e9:10.3f}  {c['wire_bytes'] / 1e9:14.3f}  "
                     f"{'yes' if c['asynchronous'] else 'no':>12}  {exposed}  groups of {c['group']}"
                     + ", between slices" * c["between_slices"])
    if b:
        lines += [
            f"bounds               compute {b['compute_seconds']:.3f} s, memory {b['memory_seconds']:.3f} s, interconnect "
            f"{b['interconnect_seconds']:.3f} s (of which exposed {b['exposed_seconds']:.3f})",
            f"step, at best        {b['step_seconds_roofline']:.3f} s, MFU {b['mfu_roofline']:.1%} (kernel rooflines)"
            + (f"; {b['step_seconds_cycles']:.3f} s, MFU {b['mfu_cycles']:.1%} (the compiler's cycles)"
               if b["step_seconds_cycles"] else ""),
        ]
    if r["gaps"]:
        lines.append("the largest gaps between the two, ms: cycles, floor, fusions, source line, operation")
        lines += [f"  {1e3 * g['cycles_seconds']:8.1f} {1e3 * g['roofline_seconds']:8.1f} {g['fusions']:6}  {g['line']:<32} "
                  f"{g['operation'][-90:]}" for g in r["gaps"]]
    if b:
        lines.append(NOTE)
    if r["unknown_loops"]:
        lines.append(f"loops of unknown length, counted once: {', '.join(r['unknown_loops'])}")
    return "\n".join(lines)
