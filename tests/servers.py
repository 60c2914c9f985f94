"""S3 (moto) and Google Cloud Storage (gcp-storage-emulator) on loopback, in a process of their own, behind a proxy that
makes the mistakes a test asks for. `with_buckets` starts both once for all tests of a process."""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time

BUCKET = "bucket-of-tests"
SCHEMES = ("s3", "gs")


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path contains `part`."""

    part: str
    times: int = 1
    status: int = 0  # answered in place of the server
    cut: bool = False  # half of the body, then the connection is closed
    seconds: float = 0.0  # before the answer
    method: str = "GET"


class Proxy:
    """Passes requests on to `port`. `requests`: (method, path, Range header) of all that came; `delay` seconds each,
    `bytes_per_second` of all answers together (0: no limit)."""

    def __init__(self, port: int):
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self.delay = self.bytes_per_second = 0.0
        self._lock, self._free_at = threading.Lock(), 0.0
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                proxy._pass_on(self, port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_any

            def log_message(self, *args) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, request, client_address) -> None:
                pass  # a client that went away

        self._server = Server(("localhost", 0), Handler)
        self.url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.faults, self.requests, self.delay, self.bytes_per_second = [], [], 0.0, 0.0

    def reads(self, part: str) -> int:
        """GET requests so far for a path that contains `part`."""
        return sum(method == "GET" and part in path for method, path, _ in self.requests)

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def _pass_on(self, client: http.server.BaseHTTPRequestHandler, port: int) -> None:
        self.requests.append((client.command, client.path, client.headers.get("Range", "")))
        body = _body(client)
        fault = self._fault(client.command, client.path)
        time.sleep(self.delay + (fault.seconds if fault else 0))
        if fault and fault.status:
            client.send_response(fault.status)
            client.send_header("Content-Length", "0")
            client.end_headers()
            return
        server = http.client.HTTPConnection("localhost", port, timeout=60)
        headers = {k: v for k, v in client.headers.items() if k.lower() not in ("connection", "transfer-encoding")}
        server.request(client.command, client.path, body, headers | {"Content-Length": str(len(body))})
        answer = server.getresponse()
        data, status = answer.read(), answer.status
        server.close()
        last = re.fullmatch(r"bytes=-(\d+)", client.headers.get("Range", "")) if status == 200 else None
        size, data = len(data), data[-int(last[1]):] if last else data
        client.send_response_only(206 if last else status)
        if last:  # which the emulator of GCS does not know
            client.send_header("Content-Range", f"bytes {size - len(data)}-{size - 1}/{size}")
        dropped = ("transfer-encoding", "connection") + (() if client.command == "HEAD" else ("content-length",))
        for name, value in answer.getheaders():
            if name.lower() not in dropped:
                client.send_header(name, value)
        if client.command != "HEAD" and status not in (204, 304):
            client.send_header("Content-Length", str(len(data)))
        client.end_headers()
        self._wait_for_bandwidth(len(data))
        if client.command != "HEAD":
            client.wfile.write(data[: len(data) // 2] if fault and fault.cut else data)
        if fault and fault.cut:
            client.close_connection = True

    def _wait_for_bandwidth(self, size: int) -> None:
        if self.bytes_per_second:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_second
                wait = self._free_at - time.monotonic()
            time.sleep(max(wait, 0))


def _body(client: http.server.BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in client.headers.get("Transfer-Encoding", ""):
        return client.rfile.read(int(client.headers.get("Content-Length", 0)))
    parts = []
    while size := int(client.rfile.readline().split(b";")[0], 16):
        parts.append(client.rfile.read(size))
        client.rfile.readline()
    client.rfile.readline()
    return b"".join(parts)


@dataclasses.dataclass
class Buckets:
    """proxies: by scheme. The environment leads every client of this process and of its children to them."""

    proxies: dict[str, Proxy]
    environment: dict[str, str]

    def reset(self) -> None:
        for proxy in self.proxies.values():
            proxy.reset()


_started: list[Buckets] = []


def with_buckets() -> Buckets:
    """Starts the servers at the first call, with one empty bucket `BUCKET` in each."""
    if not _started:
        process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ports = json.loads(process.stdout.readline())  # the servers end with this process, which closes their input
        proxies = {scheme: Proxy(ports[scheme]) for scheme in SCHEMES}
        environment = {
            "STORAGE_EMULATOR_HOST": proxies["gs"].url, "TENSORSTORE_GCS_HTTP_URL": proxies["gs"].url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks an API that the emulator has not
            "AWS_ENDPOINT_URL": proxies["s3"].url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        os.environ.update(environment)
        _started.append(Buckets(proxies, environment))
        import fsspec

        for scheme in SCHEMES:
            fsspec.filesystem(scheme).mkdir(BUCKET)
    _started[0].reset()
    return _started[0]


def _serve() -> None:
    """Prints the ports as JSON and serves until the input is closed."""
    import logging

    from gcp_storage_emulator.handlers import objects
    from moto.server import ThreadedMotoServer

    logging.disable()
    http.server.HTTPServer.request_queue_size = 256  # else, of many connections at once, most wait for seconds
    objects.download = _with_generation(objects.download)
    objects.insert, objects.delete = _conditional(objects.insert), _conditional(objects.delete)
    from gcp_storage_emulator.server import create_server  # which looks up the handlers as they are now

    s3 = ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    gs = create_server("localhost", 0, in_memory=True)
    gs.start()
    print(json.dumps({"s3": s3.get_host_and_port()[1], "gs": gs._api._httpd.server_port}), flush=True)
    sys.stdin.read()
    os._exit(0)


def _with_generation(download):
    """What Google's server does and the emulator does not: it names the generation of an object, answers 304 where the client
    has that, and 416 to a range behind the end. TensorStore relies on it."""

    def complete(request, response, storage, *args, **kwargs):
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        except Exception:  # no such object, as the handler says
            return download(request, response, storage, *args, **kwargs)
        response["X-Goog-Generation"] = found["generation"]
        start = (request.get_header("range", None) or "bytes=0-").removeprefix("bytes=").split("-")[0]
        if request.query.get("ifGenerationNotMatch") == [found["generation"]]:
            response.status = http.HTTPStatus.NOT_MODIFIED
        elif start and int(start) and int(start) >= int(found["size"]):
            response.status = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        else:
            download(request, response, storage, *args, **kwargs)

    return complete


def _conditional(change):
    """What Google's server does and the emulator does not: ifGenerationMatch is a condition, of a write and of a deletion."""

    def complete(request, response, storage, *args, **kwargs):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except Exception:  # no such object
            generation = "0"
        if request.query.get("ifGenerationMatch", [generation]) != [generation]:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        else:
            change(request, response, storage, *args, **kwargs)

    return complete


if __name__ == "__main__":
    _serve()
