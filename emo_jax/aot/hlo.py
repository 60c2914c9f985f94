"""Reads the text of a compiled, scheduled XLA program: computations, instructions, shapes, and what a fusion moves."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

_BYTES = dict(f64=8, s64=8, u64=8, f32=4, s32=4, u32=4, bf16=2, f16=2, s16=2, u16=2, s8=1, u8=1, pred=1, f8e4m3fn=1,
              f8e5m2=1, s4=0.5, u4=0.5, token=0)
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ON_CHIP = re.compile(r"S\([1-9]\)")  # a layout in a memory space other than the device's main memory


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # the rest of the line; for constants and parameters from the opcode on
    is_root: bool

    def called(self, key: str) -> str:
        """The computation behind an attribute, "" if there is none."""
        found = re.search(key + r"=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""


class Module:
    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current = None
        for line in _logical_lines(text):
            if line.startswith(("ENTRY", "%")):
                name = re.findall(r"[\w.\-]+", line.removeprefix("ENTRY "))[0]
                current = self.computations[name] = []
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif current is not None and (instruction := _parse(line)):
                current.append(instruction)
        self._frames = _frames(text)
        self._by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def find(self, computation: str, name: str) -> Instruction | None:
        return self._by_name.get(computation, {}).get(name)

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        found = (self.find(computation, name) for name in instruction.operands)
        return [i for i in found if i is not None]

    def source(self, instruction: Instruction) -> tuple[str, str]:
        """(the operation with its named scopes, "file:line" of this package that it comes from); "" where it says none."""
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return name[1] if name else "", self._frames.get(int(frame[1]), "") if frame else ""

    def moved_bytes(self, computation: str, instruction: Instruction, passed: dict[int, int] | None = None) -> float:
        """Main-memory bytes that an instruction reads and writes: operands and results once each; of a fusion's operand
        only what slices and gathers inside take, and of an in-place update only what is updated. `passed`: results
        (by number) that are operands (by number) passed on untouched."""
        body = instruction.called("calls") if instruction.opcode == "fusion" else None
        if body not in self.computations:
            return array_bytes(instruction.shape, main_memory=True) + sum(
                array_bytes(o.shape, main_memory=True) for o in self.operands(computation, instruction))
        read, passed = 0.0, passed or {}
        for index, name in enumerate(instruction.operands):
            if (operand := self.find(computation, name)) and index not in passed.values():
                read += self._read_bytes(body, index, array_bytes(operand.shape, main_memory=True))
        return read + self._written_bytes(body, instruction.shape, passed)

    def _read_bytes(self, body: str, index: int, whole: float) -> float:
        """What a fusion reads of its parameter number `index`, of `whole` bytes in main memory."""
        names, used = {self._parameter(body, index)}, 0.0
        for user in self.computations[body]:  # in order: users come after what they use
            if not whole or not names & set(user.operands):
                continue
            if user.opcode in ("dynamic-slice", "gather", "slice"):
                used = max(used, array_bytes(user.shape))
            elif user.opcode == "fusion":
                for at in (at for at, name in enumerate(user.operands) if name in names):
                    used = max(used, self._read_bytes(user.called("calls"), at, whole))
            elif user.opcode in ("bitcast", "reshape", "convert", "copy", "transpose") and not user.is_root:
                names.add(user.name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] not in names:
                return whole
        return min(used, whole)

    def _written_bytes(self, body: str, shape: str, passed: dict[int, int]) -> float:
        root = next((i for i in self.computations[body] if i.is_root), None)
        results = self.operands(body, root) if root is not None and root.opcode == "tuple" else [root]
        arrays = [match.group(0) for match in _ARRAY.finditer(shape)]
        if None in results or len(results) != len(arrays):
            results = [None] * len(arrays)
        sizes = [array_bytes(array, main_memory=True) for array in arrays]
        return sum(size if result is None else min(size, self._updated_bytes(body, result))
                   for index, (size, result) in enumerate(zip(sizes, results)) if index not in passed)

    def _updated_bytes(self, body: str, result: Instruction) -> float:
        """Bytes of a result inside a fusion: of an in-place update what is updated, else all of it."""
        while result.opcode == "bitcast" and (inner := self.find(body, result.operands[0])):
            result = inner
        if result.opcode != "dynamic-update-slice":
            return array_bytes(result.shape)
        update = self.find(body, result.operands[1])
        return array_bytes((update or result).shape)

    def _parameter(self, body: str, index: int) -> str | None:
        return next((i.name for i in self.computations[body] if i.attributes.startswith(f"parameter({index})")), None)

    def matmul_flops(self, computation: str, instruction: Instruction) -> float:
        """FLOPs of an instruction's matmuls, those inside a fusion included."""
        if instruction.opcode in ("dot", "convolution"):
            operands = self.operands(computation, instruction)[:2]
            if len(operands) < 2:
                return 0.0
            if contracted := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes):
                sizes = dimensions(operands[0].shape)[0]
                return 2.0 * _elements(instruction.shape) * math.prod(sizes[int(d)] for d in contracted[1].split(",") if d)
            # A convolution that is a plain matmul: every dimension is in two of the three arrays.
            return 2 * math.sqrt(math.prod(_elements(a.shape) for a in (instruction, *operands)))
        body = instruction.called("calls") if instruction.opcode == "fusion" else ""
        return sum(self.matmul_flops(body, inner) for inner in self.computations.get(body, ()))

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """The trips of a while loop, from XLA's annotation, or from what its condition compares: the counter, which begins at
        its initial value, with a constant or a bound that the loop carries."""
        if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes):
            return int(known.group(1))
        condition = loop.called("condition")
        body = self.computations.get(condition, [])
        for compare in (i for i in body if i.opcode == "compare"):
            compared = [_constant(i) if i.opcode == "constant" else self._initial_value(computation, loop, i)
                        for i in self.operands(condition, compare)]
            if bounds := [n for n in compared if n]:
                return max(bounds) - (min(bounds) if len(bounds) > 1 else 0)
        constants = [n for i in body if i.opcode == "constant" and (n := _constant(i)) is not None]
        return max(constants) if constants else None

    def _initial_value(self, computation, loop, element) -> int | None:
        start = self.find(computation, loop.operands[0])
        if element.opcode != "get-tuple-element" or start is None or start.opcode != "tuple":
            return None
        index = int(re.findall(r"index=(\d+)", element.attributes)[0])
        value = self.find(computation, start.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = self.find(computation, value.operands[0])
        return _constant(value) if value is not None and value.opcode == "constant" else None


def array_bytes(shape: str, main_memory: bool = False, largest: bool = False) -> float:
    """Bytes of the arrays of a shape (or of the largest); with `main_memory` without those placed on the chip."""
    sizes = [_BYTES.get(dtype, 4) * _product(dims) for dtype, dims, layout in _ARRAY.findall(shape)
             if not (main_memory and _ON_CHIP.search(layout))]
    return (max(sizes) if largest else sum(sizes)) if sizes else 0.0


def replica_groups(attributes: str) -> list[list[int]]:
    """The devices, by their number in the program, of each replica group of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        grouped = re.findall(r"'(\w+)'", mesh[3])
        numbers = _iota(mesh[2] or f"[{math.prod(sizes.values())}]", list(sizes.values()))
        order = [list(sizes).index(axis) for axis in (*(a for a in sizes if a not in grouped), *grouped)]
        return numbers.transpose(order).reshape(-1, math.prod(sizes[axis] for axis in grouped)).tolist()
    if groups := re.search(r"replica_groups=\{\{([\d,{}]+)\}\}", attributes):
        return [[int(n) for n in group.split(",")] for group in groups[1].split("},{")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2], [int(n) for n in iota[1].split(",")]).tolist()
    if pairs := re.search(r"source_target_pairs=\{\{([\d,{}]+)\}\}", attributes):
        return [[int(n) for n in pair.split(",")] for pair in pairs[1].split("},{")]
    return []


def _iota(text: str, shape: list[int]) -> np.ndarray:
    """XLA's "[4,2]T(1,0)": 0 to 7 as [4, 2], transposed; in another shape."""
    dims = [int(n) for n in re.findall(r"\d+", text[:text.index("]")])]
    order = re.search(r"T\(([\d,]+)\)", text)
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose([int(n) for n in order[1].split(",")] if order else range(len(dims))).reshape(shape)


def group_size(attributes: str) -> int:
    """Devices of each replica group of a collective; 0: all."""
    groups = [] if "replica_groups" not in attributes else replica_groups(attributes)
    return len(groups[0]) if groups else 0


def dimensions(shape: str) -> list[list[int]]:
    return [[int(d) for d in dims.split(",") if d] for _, dims, _ in _ARRAY.findall(shape)]


# ---- text -----------------------------------------------------------------------------------------------------------


def _logical_lines(text: str):
    """Lines of computations and instructions; long instructions are printed over several."""
    current = None
    for line in text.split("\n"):
        if _INSTRUCTION.match(line) or line.startswith(("%", "ENTRY", "}", "HloModule")):
            if current is not None:
                yield current
            current = line
        elif current is not None:
            current += " " + line
    if current is not None:
        yield current


def _frames(text: str) -> dict[int, str]:
    """The innermost line of this package in every stack frame that the program's head lists."""
    head = text[:text.find("\n%")]
    tables = {title: dict(re.findall(r"^(\d+) (.*)$", body, re.MULTILINE)) for title, body in re.findall(
        r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", head, re.MULTILINE)}
    if len(tables) < 3:
        return {}
    number = lambda key, row: re.search(rf"\b{key}=(\d+)", row)[1]  # ty: ignore[not-subscriptable]
    found: dict[int, str] = {}
    for frame, row in tables["StackFrames"].items():  # callers before what they call
        location = tables["FileLocations"][number("file_location_id", row)]
        file = tables["FileNames"][number("file_name_id", location)].strip('"')
        own = file.rpartition("emo_jax/")
        found[int(frame)] = (f"{own[2]}:{number('line', location)}" if own[1]
                             else found.get(int(number("parent_frame_id", row)), ""))
    return found


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = line[match.end():]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end(): end - 1]))
    attributes = rest if opcode.group(1) in ("constant", "parameter") else rest[end:]
    return Instruction(match.group(2), shape, opcode.group(1), operands, attributes, bool(match.group(1)))


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def aliases(instruction: Instruction) -> dict[int, int]:
    """Result number -> number of the operand whose memory it takes."""
    pairs = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    return {int(result or 0): int(operand) for result, operand in re.findall(r"\{(\d*)\}: \((\d+), ", pairs.group(1))} \
        if pairs else {}


def _constant(instruction: Instruction) -> int | None:
    found = re.search(r"constant\((\d+)\)", instruction.attributes)
    return found and int(found.group(1))


def _product(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _elements(shape: str) -> int:
    found = dimensions(shape)
    return math.prod(found[0]) if found else 0
