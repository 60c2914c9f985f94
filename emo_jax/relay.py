"""A relay on loopback between JAX's client and the coordinator of a run, in the first process.

JAX aborts a process (SIGABRT) as soon as its connection to the coordinator breaks, before anybody could say why. Through the
relay the client sees a coordinator that is silent, which it bears for longer than `emo_jax.liveness` needs to name it.

The relay is a process of its own, as long as the one that it serves lives: a thread would need Python's lock, which JAX holds
while it waits for what has to come through here (when processes agree on the step after which they stop).
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading

_JOINED, _BROKEN = b"joined\n", b"broken\n"


class Relay:
    """Listens at `address` and passes on to `target` (host:port). Until `join`, which is called once the run has come together,
    a connection that breaks is broken for both sides, so that JAX tries again. broken: the coordinator has closed one since."""

    def __init__(self, target: str):
        self.broken = False
        # -S: it needs nothing but the standard library. A session of its own: Ctrl-C is for the run.
        self._process = subprocess.Popen([sys.executable, "-I", "-S", __file__, target], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._news = self._process.stdin, self._process.stdout
        self.address = self._news.readline().decode().strip()

    def join(self) -> None:
        self._orders.write(_JOINED)
        self._orders.flush()
        self._news.readline()  # done
        threading.Thread(target=self._listen, name="relay", daemon=True).start()

    def _listen(self) -> None:
        self._news.readline()  # _BROKEN, or the end of the relay
        self.broken = True


class _Server:
    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.joined = False
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        _say(f"127.0.0.1:{self._listener.getsockname()[1]}\n".encode())
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append((client, server))  # both stay open, whoever closes the other end
            threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, from_coordinator: bool) -> None:
        ended = sink  # who ended it
        with contextlib.suppress(OSError):
            while data := self._received(source):
                sink.sendall(data)
            ended = source
        if self.joined and from_coordinator == (ended is source):
            _say(_BROKEN)
            return
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _received(source: socket.socket) -> bytes:
        try:
            return source.recv(1 << 16)
        except OSError:
            return b""


def _say(line: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _main() -> None:
    """Serves until the process that started it closes its end, or dies; signals for the whole run are not for the relay."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = _Server(sys.argv[1])
    for line in sys.stdin.buffer:
        server.joined |= line == _JOINED
        _say(line)


if __name__ == "__main__":
    _main()
