"""What a profile (XSpace, *.xplane.pb) says of a step: its instructions are events with a name; which part of the model they
belong to is in the programs that the profile carries along, as XProf reads it, in the wire format of protocol buffers."""

import jax

from emo_jax.bench.breakdown import scope_of


def fields(message, number):
    """The values of a field of a message: bytes, or integers."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        else:
            size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            value, at = message[at:at + size], at + size
        if key >> 3 == number:
            yield value


def op_names(path):
    """{instruction: its path of scopes} of all programs of a profile."""
    found = {}
    for plane in fields(path.read_bytes(), 1):
        for entry in fields(plane, 4):
            for metadata in fields(entry, 2):
                for program in (bytes_ for stat in fields(metadata, 5) for bytes_ in fields(stat, 6)):
                    for module in fields(program, 1):
                        for computation in fields(module, 3):
                            for instruction in fields(computation, 2):
                                name = next(fields(instruction, 1)).decode()
                                for about in fields(instruction, 7):
                                    found[name] = next(fields(about, 2), b"").decode()
    return found


def scopes_and_steps(path):
    """(the scopes of which an instruction was executed, the steps that were dispatched)"""
    names, scopes, steps = op_names(path), set(), set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = {name: value for name, value in event.stats if name in ("hlo_op", "hlo_module", "step_num")}
            if event.name == "train" and "step_num" in stats:
                steps.add(stats["step_num"])
            if stats.get("hlo_module") == "jit_train_step":
                scopes.add(scope_of(names.get(stats["hlo_op"], "")))
    return scopes, steps
