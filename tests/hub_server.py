"""A Hugging Face Hub on loopback, in memory: the endpoints that the real clients call, and faults when asked for."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
LARGE = (".parquet", ".safetensors")  # by Git LFS: clients need HF_HUB_DISABLE_XET=1
RESOLVE = r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


class HubServer:
    """Serves until it is left: `with HubServer() as hub: ...` with HF_ENDPOINT set to `hub.url`.

    Attributes:
        users: token -> what whoami says of its owner.
        repos: "model user/name" -> its facts and `files`, path -> bytes, as of its newest commit.
        objects: SHA-256 -> bytes, of the large files (`LARGE`) uploaded so far, committed or not.
        requests: (method, path, token or None) of each request, in order.
        interfere: asked before each request with the handler; True: it has dealt with it.
    """

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.interfere: Callable[[Any], bool] = lambda handler: False
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[tuple[str, str], ...] = ()) -> None:
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org, "roleInOrg": in_org} for org, in_org in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def files(self, repo: str, kind: str = "model") -> dict[str, bytes]:
        return self.repos[f"{kind} {repo}"]["files"]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that have gone are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, self.token))
        if self.hub.interfere(self):
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                return answer(self, body, **found.groupdict())
        self.answer(404, {"error": f"no such endpoint: {path}"})

    def answer(self, code: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        if code >= 400:
            headers.setdefault("X-Error-Message", content["error"])
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> dict[str, Any] | None:
        user = self.hub.users.get(self.token)
        if user is None:
            self.answer(401, {"error": "Invalid username or password."})
        return user

    def _may_write(self, namespace: str) -> bool:
        """Whether the token's owner may; if not, that has been answered."""
        if (user := self._user()) is None:
            return False
        spaces = {user["name"]} | {org["name"] for org in user["orgs"] if org["roleInOrg"] != "read"}
        if namespace in spaces and user["auth"]["accessToken"]["role"] != "read":
            return True
        self.answer(403, {"error": f"You don't have the rights to create a model under the namespace {namespace!r}."})
        return False

    def _repo(self, kind: str | None, repo: str) -> dict[str, Any] | None:
        found = self.hub.repos.get(f"{kind or 'model'} {repo}")
        hidden = found is not None and found["private"] and self.token not in self.hub.users
        if found is None or hidden:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def alive(self, body: bytes) -> None:
        self.answer(200, {})

    def whoami(self, body: bytes) -> None:
        if (user := self._user()) is not None:
            self.answer(200, user)

    def auth_check(self, body: bytes, kind: str, repo: str, write: str | None) -> None:
        if self._repo(kind, repo) is not None and (not write or self._may_write(repo.split("/")[0])):
            self.answer(200, {})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        if (user := self._user()) is None:
            return
        namespace = asked.get("organization") or user["name"]
        if not self._may_write(namespace):
            return
        name, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if f"{kind} {name}" in self.hub.repos:
            self.answer(409, {"error": "You already created this repo", "url": url})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[f"{kind} {name}"] = {"private": private, "files": {}, "sha": _sha(b"new"), "commits": 0}
        self.answer(200, {"url": url, "name": name})

    def info(self, body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        if (found := self._repo(kind, repo)) is not None:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(found["files"].items())]
            facts = {"id": repo, "sha": found["sha"], "private": found["private"], "siblings": siblings, "tags": []}
            self.answer(200, facts | {"lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        if self._may_write(repo.split("/")[0]) and self._repo(kind, repo) is not None:
            mode = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": mode[path.endswith(LARGE)]} for path in paths]
            self.answer(200, {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})

    def lfs_batch(self, body: bytes, kind: str | None, repo: str) -> None:
        if not self._may_write(repo.split("/")[0]):
            return
        asked = json.loads(body)["objects"]
        upload = lambda oid: {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}
        actions = [{"actions": upload(one["oid"])} if one["oid"] not in self.hub.objects else {} for one in asked]
        objects = [{"oid": one["oid"], "size": one["size"], **more} for one, more in zip(asked, actions, strict=True)]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() == oid:
            self.hub.objects[oid] = body
            self.answer(200, {})
        else:
            self.answer(400, {"error": "other content than announced"})

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        if not self._may_write(repo.split("/")[0]) or (found := self._repo(kind, repo)) is None:
            return
        files = dict(found["files"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        found["commits"] += 1
        found.update(files=files, sha=_sha(f"{repo} {found['commits']}".encode()))
        self.answer(200, {"success": True, "commitOid": found["sha"], "commitUrl": f"{self.hub.url}/{repo}/commit/x"})

    def tree(self, body: bytes, kind: str, repo: str, revision: str, path: str | None) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        under = f"{path}/" if path else ""
        inside = {name: data for name, data in sorted(found["files"].items()) if name.startswith(under)}
        folders = set()
        if "recursive=true" not in self.path.lower():
            folders = {under + name[len(under) :].split("/")[0] for name in inside if "/" in name[len(under) :]}
            inside = {name: data for name, data in inside.items() if "/" not in name[len(under) :]}
        entries = [_folder(name) for name in sorted(folders)] + [_entry(*item) for item in inside.items()]
        if path and not entries:
            self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, entries)

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        asked = (
            json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", unquote(body.decode()))
        )
        files = [_entry(path, found["files"][path]) for path in asked if path in found["files"]]
        folders = {path for path in asked if any(name.startswith(f"{path}/") for name in found["files"])}
        self.answer(200, files + [_folder(path) for path in folders])

    def resolve(self, body: bytes, kind: str | None, repo: str, revision: str, path: str) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        if path not in found["files"]:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found["sha"])
            return
        data = found["files"][path]
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if start:
            data = data[int(start[1]) : int(start[2] or len(data)) + 1]
        headers = {"ETag": f'"{_sha(found["files"][path])}"', "X_Repo_Commit": found["sha"]}
        self.answer(206 if start else 200, data, **headers)


ROUTES: list[tuple[str, str, Callable]] = [
    ("GET HEAD", r"/?", _Handler.alive),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("GET", rf"{REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", REPO, _Handler.info),
    ("GET", rf"{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", rf"{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", rf"{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET HEAD", RESOLVE, _Handler.resolve),
]


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _sha(data)}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": _sha(path.encode())}
