"""Starting a run of several real processes on this machine, and waiting for its end."""

import json
import os
import socket
import subprocess
import sys


def start(config, out, processes, *overrides):
    """`emo-jax train` as `processes` processes with four devices in all."""
    return start_command(["-m", "emo_jax", "train", config, "--out", str(out), "--json", *overrides], processes)


def start_command(command, processes):
    """Python with the arguments `command`."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]  # what compiles faster stays
    env = os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={4 // processes}"])}
    if processes > 1:
        env |= {"EMO_JAX_COORDINATOR": f"localhost:{port}", "EMO_JAX_NUM_PROCESSES": str(processes)}
    return [subprocess.Popen([sys.executable, *command], env=env | ({"EMO_JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(processes)]


def finish(started, status=0):
    """The result that the first process prints; the others print none."""
    try:
        outputs = [p.communicate(timeout=400) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [status] * len(started), "\n".join(err for _, err in outputs)
    assert not any(line.startswith("{") for out, _ in outputs[1:] for line in out.splitlines())
    return json.loads(outputs[0][0].splitlines()[-1])
