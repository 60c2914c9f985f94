"""The HTTP API of the Hugging Face hub, as far as uploading and downloading a model needs it, on loopback."""

import base64
import hashlib
import http.server
import json
import re
import threading

SHA = "1" * 40


class Hub:
    """`files`: {repo: {path: bytes}}, after a commit. Only `token` is accepted. `requests`: (method, path) of all that came."""

    def __init__(self, token: str = "hf_of_tests"):
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self):
                hub.requests.append((self.command, self.path))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upload = self.path.startswith("/upload/")
                if not upload and self.headers.get("Authorization") != f"Bearer {token}":
                    return self.answer(401, {"error": "Invalid credentials"})
                status, value, headers = hub.respond(self.command, self.path.partition("?")[0], body)
                self.answer(status, value, headers)

            do_GET = do_PUT = do_POST = do_HEAD = do_any

            def answer(self, status, value, headers=None):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for key, content in (headers or {}).items():
                    self.send_header(key, content)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self._server.shutdown()
        self._server.server_close()

    def respond(self, method, path, body):
        """(status, JSON or bytes, headers)"""
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}, None
        if path == "/api/validate-yaml":  # of a README.md
            good = json.loads(body)["content"].startswith("---\n")
            return 200 if good else 400, {"errors": [], "warnings": []}, None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.files else 200
            self.files.setdefault(name, {})
            return status, {"url": f"{self.url}/{name}", "id": name}, None
        if path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            return 200, {}, None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            lfs = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            return 200, {"files": [{"path": f["path"], "uploadMode": lfs(f["path"]), "shouldIgnore": False, "oid": None}
                                   for f in json.loads(body)["files"]]}, None
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            to = lambda o: {"actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
            return 200, {"transfer": "basic", "objects": [o | to(o) for o in json.loads(body)["objects"]]}, None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                kind, value = (entry := json.loads(line))["key"], entry["value"]
                if kind == "file":
                    self.files[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    self.files[found[1]][value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{found[1]}/commit/{SHA}", "commitOid": SHA, "commitTitle": "export"}, None
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        if found and found[1] in self.files:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files[found[1]].items()]
            return 200, {"id": found[1], "sha": SHA, "siblings": siblings, "private": False, "tags": []}, None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                         for name, data in self.files[found[1]].items()], None
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if found and found[2] in self.files.get(found[1], {}):
            data = self.files[found[1]][found[2]]
            return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA}
        return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
