"""A hub on this machine: accounts, repositories, uploads by git's LFS protocol, and downloads, by the requests that
huggingface_hub sends. It keeps everything in memory."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import yaml
from huggingface_hub.utils.sha import git_hash

WRITER, READER = "hf_" + "WriteToken" * 3, "hf_" + "ReadTokens" * 3
LARGE = (".safetensors", ".bin")  # kept by LFS


def account(name: str, role: str, **more) -> dict:
    return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}, **more}


class HubServer:
    """A hub with the accounts of `WRITER` and `READER`, both of the user "ann".

    Attributes:
        repositories: by OWNER/NAME: `private`, `files` (name to content) and `commits` (names added, names deleted).
        requests: what was asked, as "PUT /lfs/..." and the like.
        refused: by a part of such a request, the HTTP status to answer it with.
        on_request: called with each of them before it is answered; if it returns true, the connection is closed.
    """

    def __init__(self):
        role = {"orgs": [{"name": "club", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]}
        self.accounts = {WRITER: account("ann", "write", **role), READER: account("ann", "read", **role)}
        self.repositories: dict[str, SimpleNamespace] = {}
        self.requests: list[str] = []
        self.refused: dict[str, int] = {}
        self.on_request = lambda request: False
        self.large: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> SimpleNamespace:
        self.repositories[name] = SimpleNamespace(private=private, files=dict(files or {}), commits=[])
        return self.repositories[name]

    def environment(self, token: str | None = WRITER) -> dict[str, str]:
        """Variables for a program that uses this hub. Tests have no Xet storage."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._respond(b"")

    def do_HEAD(self):
        self._respond(b"")

    def do_POST(self):
        self._respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self):
        self._respond(self._read_body())

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _respond(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if self.hub.on_request(request):
            self.close_connection = True
            return
        status = next((status for part, status in self.hub.refused.items() if part in request), None)
        if status:
            return self._send(status, {"error": "refused by the test"})
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return answer(self, body, *match.groups())
        return self._send(404, {"error": "no such page"}, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, content: dict | list | bytes, headers: dict | None = None) -> None:
        is_file = isinstance(content, bytes)
        payload = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        default = {"Content-Type": "application/octet-stream" if is_file else "application/json"}
        for name, value in (default | {"Content-Length": str(len(payload))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *args):
        pass

    # Answers

    def _account(self) -> dict | None:
        return self.hub.accounts.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, name: str) -> SimpleNamespace | None:
        """The repository, if it exists and may be seen; otherwise the request is answered."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._account()):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _may_write(self, name: str) -> bool:
        """Whether the token may write there; otherwise the request is answered."""
        asks, owner = self._account(), name.partition("/")[0]
        writable = asks and {asks["name"], *(o["name"] for o in asks["orgs"] if o["roleInOrg"] != "read")}
        if asks and owner in writable and asks["auth"]["accessToken"]["role"] != "read":
            return True
        self._send(403 if asks else 401, {"error": "Forbidden"})
        return False

    def whoami(self, body: bytes) -> None:
        found = self._account()
        self._send(200 if found else 401, found or {"error": "Invalid credentials in Authorization header"})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        asks = self._account()
        name = f"{wanted['organization'] or (asks and asks['name'])}/{wanted['name']}"
        if not self._may_write(name):
            return
        exists = name in self.hub.repositories
        if not exists:
            self.hub.create(name, {".gitattributes": b"*.bin filter=lfs\n"}, wanted.get("visibility") == "private")
        self._send(409 if exists else 200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def info(self, body: bytes, name: str) -> None:
        if found := self._repository(name):
            siblings = [{"rfilename": file} for file in found.files]
            self._send(200, {"id": name, "sha": "0" * 40, "private": found.private, "siblings": siblings})

    def tree(self, body: bytes, name: str) -> None:
        if found := self._repository(name):
            files = found.files.items()
            self._send(200, [{"type": "file", "path": f, "size": len(c), "oid": _digest(c)} for f, c in files])

    def may_write(self, body: bytes, name: str) -> None:
        if self._repository(name) and self._may_write(name):
            self._send(200, {})

    def check_card(self, body: bytes) -> None:
        """The front matter must be a mapping with plain dates, names and numbers, as the hub has it."""
        text = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            is_valid = isinstance(yaml.safe_load(match[1]), dict) if match else True
        except yaml.YAMLError:
            is_valid = False
        self._send(200 if is_valid else 400, {"errors": [] if is_valid else [{"message": "not YAML"}], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if not ((found := self._repository(name)) and self._may_write(name)):
            return
        answers = []
        for file in (each["path"] for each in json.loads(body)["files"]):
            is_large, known = file.endswith(LARGE), found.files.get(file)
            oid = None if known is None else _digest(known) if is_large else git_hash(known)
            mode = "lfs" if is_large else "regular"
            answers.append({"path": file, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        if self._may_write(name):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, name: str) -> None:
        if not ((found := self._repository(name)) and self._may_write(name)):
            return
        added, deleted = [], []
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                found.files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del found.files[value["path"]]
                deleted.append(value["path"])
            if kind in ("file", "lfsFile"):
                added.append(value["path"])
        found.commits.append((sorted(added), sorted(deleted)))
        url = f"{self.hub.endpoint}/{name}/commit/{len(found.commits)}"
        self._send(200, {"commitUrl": url, "commitOid": "0" * 40})

    def download(self, body: bytes, name: str, file: str) -> None:
        if not (found := self._repository(name)):
            return
        if file not in found.files:
            return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = found.files[file]
        # Downloads are kept by the commit, so its name must be another for other content.
        revision = hashlib.sha1(repr(sorted(found.files.items())).encode()).hexdigest()
        self._send(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": revision})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.check_card,
    f"GET /api/models/{NAME}": _Handler.info,
    f"GET /api/models/{NAME}/revision/\\w+": _Handler.info,
    f"GET /api/models/{NAME}/tree/\\w+": _Handler.tree,
    f"GET /api/models/{NAME}/auth-check/write": _Handler.may_write,
    f"POST /api/models/{NAME}/preupload/main": _Handler.preupload,
    f"POST /{NAME}.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(\w+)": _Handler.put,
    f"POST /api/models/{NAME}/commit/main": _Handler.commit,
    f"(?:GET|HEAD) /{NAME}/resolve/\\w+/(.+)": _Handler.download,
}
