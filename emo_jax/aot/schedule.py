"""Walks the schedule of a compiled program and adds up what it computes, moves and communicates.

Loops count as often as they run; of a conditional the first branch counts (the MoE layer's fallback is the second). Two
estimates of the time of everything but collectives: `roofline`, max(FLOPs / peak, bytes / bandwidth) of every kernel, and
`cycles`, the compiler's own estimate of its fusions. A collective takes its ring bytes / link bandwidth; an asynchronous
one is exposed only for what the work between its start and its end does not cover. One that crosses from slice to slice takes
its bytes / the network's bandwidth of each chip. These rank programs; they are no
measurement: contention, launch and DMA overheads, and slow gathers are in neither.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from dataclasses import dataclass, field

from emo_jax.aot.hlo import Instruction, Module, aliases, array_bytes, dimensions, group_size, replica_groups
from emo_jax.chips import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
_FREE = ("copy-start", "copy-done", "slice-start", "slice-done", "dynamic-slice-start", "dynamic-slice-done",
         "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id")


@dataclass
class Collective:
    """All collectives of one kind, of one way of running, over groups of one size; of one device and step."""

    kind: str
    asynchronous: bool
    group: int
    between_slices: bool = False
    count: int = 0
    payload_bytes: float = 0.0  # the whole array: the gathered, or the unreduced one
    wire_bytes: float = 0.0  # that a device sends in a ring; between slices: over the network
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass
class Gap:
    """The compiler's cycles of all fusions that one operation of one source line became, and their floor."""

    operation: str
    line: str
    cycles_seconds: float = 0.0
    roofline_seconds: float = 0.0
    fusions: int = 0


@dataclass
class Schedule:
    roofline_seconds: float = 0.0  # without communication
    cycles_seconds: float = 0.0
    exposed_seconds: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)  # Pallas: name -> (calls, seconds)
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)  # the largest first


@dataclass
class _Pending:
    collective: Collective
    seconds: float
    times: int
    carried: bool = False  # moves on only in the fusions that carry its steps
    covered: float = 0.0


def schedule(module: Module, chip: Chip, grid: tuple[int, ...] = (), slices: int = 1, slice_devices: int = 0) -> Schedule:
    """`grid`: devices along each torus axis of a slice, if it is one. slice_devices: of each of several `slices`, whose devices
    are numbered one slice after the other."""
    walk = _Walk(module, chip, grid, slices, slice_devices)
    walk.computation(module.entry, 1)
    walk.result.gaps = sorted(walk.gaps.values(), key=lambda g: g.roofline_seconds - g.cycles_seconds)
    walk.result.collectives = sorted(walk.collectives.values(), key=lambda c: -c.wire_bytes)
    return walk.result


class _Walk:
    def __init__(self, module: Module, chip: Chip, grid: tuple[int, ...], slices: int, slice_devices: int):
        self.module, self.chip, self.grid, self.result = module, chip, sorted(grid, reverse=True), Schedule()
        self.slices, self.slice_devices = slices, slice_devices
        self.collectives: dict[tuple, Collective] = {}
        self.gaps: dict[tuple[str, str], Gap] = {}
        self.home = {id(i): name for name, body in module.computations.items() for i in body}

    def computation(self, name: str, times: int) -> float:
        """Adds a computation that runs `times` times; returns the seconds of one run, by the compiler's cycles."""
        pending: dict[str, _Pending] = {}
        total = 0.0
        for i in self.module.computations[name]:
            own = self.instruction(name, i, times, pending)
            for key, collective in pending.items():
                collective.covered += own if key != i.name and not collective.carried else 0.0
            total += own
        for collective in pending.values():  # left open at the end of a loop body: runs into the next iteration
            self._finish(collective)
        return total

    def instruction(self, home: str, i: Instruction, times: int, pending: dict[str, _Pending]) -> float:
        if i.opcode == "while":
            trips = self.module.trip_count(home, i)
            if trips is None:
                self.result.unknown_loops.append(i.name)
            return self.computation(i.called("body"), times * (trips or 1)) * (trips or 1)
        if i.opcode == "conditional":
            first = re.search(r"(?:branch_computations=\{|false_computation=)%?([\w.\-]+)", i.attributes)
            return self.computation(first.group(1), times) if first else 0.0
        if i.opcode == "call" and "sparsecore" not in i.attributes:
            return self.computation(i.called("to_apply"), times)
        if i.opcode in KINDS:
            return self._synchronous(i.opcode, i, times)
        if i.opcode.removesuffix("-start") in (*KINDS, "async", "call") and i.opcode.endswith("-start"):
            return self._start(i, times, pending)
        if i.opcode == "send" and (kind := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)):
            return self._send_to_slices(home, kind[1].lower().replace("_", "-"), i, times, pending)
        if i.opcode.endswith("-done"):
            started = pending.pop(i.operands[0], None) if i.operands else None
            return self._finish(started) if started else 0.0
        if i.opcode in _FREE:
            return 0.0
        if i.opcode == "fusion" and (inner := self._inner_collectives(i.called("calls"))):
            return self._fused_collective(home, i, inner, times, pending)
        if i.opcode == "custom-call" and "tpu_custom_call" in i.attributes:
            return self._kernel(home, i, times)
        return self._plain(home, i, times)

    def _plain(self, home, i, times) -> float:
        cycles = self._cycles(i)
        counted = i.opcode == "fusion" or cycles
        moved = self.module.moved_bytes(home, i) if counted else 0.0
        roofline = self._add(cycles, self.module.matmul_flops(home, i), moved, times)
        if cycles:
            source = self.module.source(i)
            gap = self.gaps.setdefault(source, Gap(*source))
            gap.cycles_seconds += cycles * times
            gap.roofline_seconds += roofline * times
            gap.fusions += times
        return cycles

    def _kernel(self, home, i, times) -> float:
        """A Pallas kernel: FLOPs as it declares them, bytes of its operands and results once."""
        operands = self.module.operands(home, i)
        moved = array_bytes(i.shape, True) + sum(array_bytes(o.shape, True) for o in {o.name: o for o in operands}.values())
        declared = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.attributes)
        name = re.sub(r"[.\d]+$", "", i.name)
        flops = int(declared.group(1)) if declared else _attention_flops(name, [o.shape for o in operands])
        seconds = self._add(None, flops, moved, times)
        calls, before = self.result.kernels.get(name, (0, 0.0))
        self.result.kernels[name] = calls + times, before + seconds * times
        return seconds

    def _add(self, cycles: float | None, flops: float, moved: float, times: int) -> float:
        """Seconds at the roofline."""
        roofline = max(flops / self.chip.flops, moved / self.chip.bandwidth)  # ty: ignore[unsupported-operator]
        self.result.roofline_seconds += roofline * times
        self.result.cycles_seconds += (roofline if cycles is None else cycles) * times
        self.result.flops += flops * times
        self.result.moved_bytes += moved * times
        return roofline

    def _cycles(self, i: Instruction) -> float:
        found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        return int(found.group(1)) / (self.chip.clock or 1.75e9) if found else 0.0

    # ---- collectives ----

    def _synchronous(self, kind, i, times) -> float:
        collective, seconds = self._count(kind, i, times, False)
        collective.exposed_seconds += seconds * times
        self.result.exposed_seconds += seconds * times
        return seconds

    def _start(self, i, times, pending) -> float:
        kind, inner = i.opcode.removesuffix("-start"), i
        if kind in ("async", "call"):
            found = self._inner_collectives(i.called("calls") or i.called("to_apply"))
            if not found:
                return 0.0
            kind, inner = found[0]
        collective, seconds = self._count(kind, inner, times, True)
        pending[i.name] = _Pending(collective, seconds, times)
        return 0.0

    def _send_to_slices(self, home, kind, i, times, pending) -> float:
        """What TPUs hand to their hosts' network, and get back when the `recv` of the same rendezvous is done."""
        rendezvous = re.search(r'_rendezvous="[^"]*"', i.attributes)
        collective, seconds = self._add_collective(kind, True, self.slices, True, times, *self._network(
            kind, array_bytes(i.shape, largest=True), self.slices, self.slices))
        back = next((other.name for other in self.module.computations[home]
                     if other.opcode == "recv" and rendezvous and rendezvous[0] in other.attributes), i.name)
        pending[back] = _Pending(collective, seconds, times)
        return 0.0

    def _fused_collective(self, home, i, inner, times, pending) -> float:
        """A collective inside a fusion: an all-reduce and a slice, which is a reduce-scatter; or a step of one that is
        spread over several fusions, told by its channel."""
        cycles = self._cycles(i)
        for kind, instruction in inner:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = f"channel {channel.group(1)}" if channel else instruction.name
            sliced = any(x.opcode == "dynamic-slice" for x in self.module.computations[self.home[id(instruction)]])
            kind = "reduce-scatter" if kind == "all-reduce" and sliced else kind
            if "async-collective-start" in i.name:
                collective, seconds = self._count(kind, instruction, times, True)
                pending[key] = _Pending(collective, seconds, times, carried=True)
            elif "async-collective-done" in i.name:
                if key in pending:
                    cycles += self._finish(pending.pop(key))
            elif key in pending:
                pending[key].covered += self._cycles(i)
            else:
                cycles += self._synchronous(kind, instruction, times)
        if "async-collective-" not in i.name:
            # Its buffers are not what the fusion itself moves: a step of a longer one passes them on in place.
            passed = aliases(i)
            in_flight = 0.0 if passed else 2 * sum(array_bytes(x.shape) for _, x in inner)
            moved = max(0.0, self.module.moved_bytes(home, i, passed) - in_flight)
            self._add(self._cycles(i), self.module.matmul_flops(home, i), moved, times)
        return cycles

    def _finish(self, pending: _Pending) -> float:
        exposed = max(0.0, pending.seconds - pending.covered)
        pending.collective.exposed_seconds += exposed * pending.times
        self.result.exposed_seconds += exposed * pending.times
        return exposed

    def _count(self, kind, i, times, asynchronous) -> tuple[Collective, float]:
        group, slices = group_size(i.attributes), self._spanned_slices(i)
        payload = self._payload(kind, i)
        if slices > 1:
            return self._add_collective(kind, asynchronous, group, True, times, *self._network(kind, payload, slices, group))
        # All-reduce: reduce-scatter and all-gather. What a device keeps does not travel.
        passes = 2 if kind == "all-reduce" else 1
        wire = payload * passes * ((group - 1) / group if group and kind != "collective-permute" else 1)
        links = 0.5 if kind == "collective-permute" else self._axes(group)  # a permute: one direction of one axis
        seconds = wire / (self.chip.link * links)  # ty: ignore[unsupported-operator]
        return self._add_collective(kind, asynchronous, group, False, times, payload, wire, seconds)

    def _network(self, kind, payload, slices, group) -> tuple[float, float, float]:
        """(payload, bytes that a device sends to other slices, seconds): all devices of a slice share out what it has."""
        wire = payload * (2 if kind == "all-reduce" else 1) * (slices - 1) / max(group, slices)
        return payload, wire, wire / (self.chip.network or math.nan)

    def _add_collective(self, kind, asynchronous, group, between_slices, times, payload, wire,
                        seconds) -> tuple[Collective, float]:
        key = (kind, asynchronous, group, between_slices)
        collective = self.collectives.setdefault(key, Collective(*key))
        collective.count += times
        collective.payload_bytes += payload * times
        collective.wire_bytes += wire * times
        collective.seconds += seconds * times
        return collective, seconds

    def _payload(self, kind, i) -> float:
        operands = [o.shape for o in self.module.operands(self.home[id(i)], i)]
        if kind == "ragged-all-to-all":
            return array_bytes(operands[0]) if operands else array_bytes(i.shape)
        if kind == "reduce-scatter" or (kind == "all-reduce" and i.opcode.endswith("-start")):
            return sum(map(array_bytes, operands))
        return array_bytes(i.shape, largest=i.opcode.endswith("-start") or kind.startswith("collective"))

    def _spanned_slices(self, i: Instruction) -> int:
        """How many slices the largest of its groups spans."""
        if not self.slice_devices:
            return 1
        return max((len({n // self.slice_devices for n in group}) for group in replica_groups(i.attributes)), default=1)

    def _axes(self, group: int) -> int:
        """Torus axes whose links a group of this size can use at the same time: as few as hold it."""
        held = itertools.accumulate(self.grid, operator.mul)
        return next((n for n, devices in enumerate(held, 1) if devices >= group), max(1, len(self.grid)))

    def _inner_collectives(self, name: str | None, depth: int = 0) -> list[tuple[str, Instruction]]:
        found = []
        for i in self.module.computations.get(name, ()):
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append((kind, i))
            elif i.opcode in ("fusion", "call", "async-start", "call-start") and depth < 8:
                found += self._inner_collectives(i.called("calls") or i.called("to_apply"), depth + 1)
        return found


def _attention_flops(name: str, operand_shapes: list[str]) -> float:
    """FLOPs of a flash attention kernel that declares none: matmuls of [rows x heads, T, W], half of each below the
    diagonal."""
    if "splash" not in name and "flash" not in name:
        return 0.0
    largest = max((d for shape in operand_shapes for d in dimensions(shape)), key=math.prod, default=[])
    if len(largest) < 3:
        return 0.0
    *batch, length, width = largest
    matmuls = 2 if "fwd" in name else 5  # the backward kernel is the fused one: dq, dk and dv
    return matmuls * math.prod(batch) * length * length * width
