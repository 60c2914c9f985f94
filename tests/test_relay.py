"""The way from a process to the coordinator of its run."""

import ctypes
import subprocess
import sys
import time

from emo_jax.relay import Relay

# Both ends of a connection through the relay: what it says is the time when its bytes had come through.
ENDS = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
relay = sys.stdin.readline().strip()
sys.stdin.readline()
host, _, port = relay.rpartition(":")
client = socket.create_connection((host, int(port)))
server, _ = listener.accept()
client.sendall(b"alive")
assert server.recv(5) == b"alive"
print(time.time(), flush=True)
sys.stdin.readline()
"""


def ends():
    process = subprocess.Popen([sys.executable, "-c", ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               bufsize=1)
    relay = Relay(f"127.0.0.1:{process.stdout.readline().strip()}")
    process.stdin.write(f"{relay.address}\n")
    return process, relay


def test_it_passes_on_while_this_process_holds_pythons_lock():
    """JAX holds it while it agrees with the others on the step to stop after, which takes messages through the relay."""
    process, _ = ends()
    process.stdin.write("go\n")
    ctypes.PyDLL(None).usleep(3_000_000)  # does not let go of the lock
    released = time.time()
    assert float(process.stdout.readline()) < released
    process.communicate("done\n")


def test_it_says_when_the_other_end_is_gone_and_ends_with_the_process_that_it_serves():
    process, relay = ends()
    process.stdin.write("go\n")
    process.stdout.readline()
    relay.join()
    assert not relay.broken
    process.communicate("done\n")
    while not relay.broken:
        time.sleep(0.01)
    served = subprocess.run([sys.executable, "-c", "from emo_jax.relay import Relay; r = Relay('127.0.0.1:1')\n"
                             "print(r._process.pid, flush=True); import os; os.kill(os.getpid(), 9)"],
                            stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while _is_running(int(served.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(served.stdout))


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
