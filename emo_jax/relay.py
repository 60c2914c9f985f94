"""A relay on loopback between JAX's client and the coordinator of a run, in the first process.

JAX aborts a process (SIGABRT) as soon as its connection to the coordinator breaks, before anybody could say why. Through the
relay the client sees a coordinator that is silent, which it bears for longer than `emo_jax.liveness` needs to name it.
"""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Listens at `address` and passes on to `target` (host:port). joined: set it once the run has come together; until then a
    connection that breaks is broken for both sides, so that JAX tries again. broken: the coordinator has closed one since."""

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.joined = self.broken = False
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

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
            self.broken = True
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
