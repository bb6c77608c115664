"""A made-up model hub on this machine: it makes repositories, takes commits, and keeps what was pushed."""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_made_up"


class Hub(ThreadingHTTPServer):
    """Serves at `url`; `files` are the pushed bytes by repository, branch and name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: list[str] = []
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.large: dict[str, bytes] = {}
        self.fails_at = "nothing"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.path.endswith("/auth-check/write") and "/models/me/" in self.path:
            self._answer({})
        else:
            self._answer({"error": "not yours"}, 403 if "auth-check" in self.path else 404)

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "bad token"}, 401)
        elif self.server.fails_at in self.path:
            self._answer({"error": "the hub is full"}, 507)
        else:
            self._answer(self._content(body))

    def _content(self, body: bytes) -> dict[str, Any]:
        url = self.server.url
        if self.path == "/api/repos/create":
            given = json.loads(body)
            self.server.repositories.append(f"{given.get('organization') or 'me'}/{given['name']}")
            return {"url": f"{url}/{self.server.repositories[-1]}"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"objects": [o | {"actions": {"upload": {"href": f"{url}/lfs/{o['oid']}"}}} for o in objects]}
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            self._commit(*match.groups(), body.decode().splitlines())
            return {"commitUrl": f"{url}/{match[1]}/commit/0", "commitOid": "0" * 40}
        return {}  # metadata is right, a branch is made

    def _commit(self, repository: str, branch: str, lines: list[str]) -> None:
        for entry in map(json.loads, lines):
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
            else:
                continue
            self.server.files[repository, branch, value["path"]] = content
