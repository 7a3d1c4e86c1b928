# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A Hub on this machine, for the real client: point `HF_ENDPOINT` at it."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import yaml


USER = "user"
TOKENS = {"hf_write": "write", "hf_read": "read"}  # both of USER
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".pth")


@dataclass
class Blob:
    """A file of a commit: content at `path`, its digest as git (sha1) or git LFS (sha256) names it."""

    path: Path
    oid: str
    size: int
    is_lfs: bool


@dataclass
class Repo:
    """Branches name commits, and a commit holds all files."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        listing = json.dumps([len(self.commits), sorted((name, blob.oid) for name, blob in files.items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class LocalHub:
    """
    A server with the repositories of `user`, for the time of a `with` block.

    Args:
        folder (`Path`):
            Where contents are kept.

    Attributes:
        faults (`list[tuple[str, str, int | str, str]]`):
            Method, regular expression of the path, and what the next request that both match gets instead of an
            answer: a status with a message, or `"cut"`, a connection that breaks in the middle (of the request, or of
            the answer to a GET). Each is used once.
        requests (`list[tuple[str, str]]`):
            Method and path of every request so far.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.faults: list[tuple[str, str, int | str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = "hf_write") -> dict[str, str]:
        """Environment of a process whose client knows this Hub only, with a cache of its own."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if token is not None:
            own["HF_TOKEN"] = token
        unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY")
        return {**{name: value for name, value in os.environ.items() if name not in unset}, **own, "NO_PROXY": "*"}

    def keep(self, source: BinaryIO | bytes | Path, is_lfs: bool) -> Blob:
        """Take content into storage. A file named by its path is moved."""
        if isinstance(source, Path):
            sha256 = hashlib.sha256()
            with open(source, "rb") as file:
                while chunk := file.read(2**20):
                    sha256.update(chunk)
            digest = sha256.hexdigest()
            path = self.folder / digest
            shutil.move(source, path)
        else:
            content = source if isinstance(source, bytes) else source.read()
            digest = hashlib.sha256(content).hexdigest()
            path = self.folder / digest
            path.write_bytes(content)
        size, oid = path.stat().st_size, digest
        if not is_lfs:
            oid = hashlib.sha1(f"blob {size}\0".encode() + path.read_bytes()).hexdigest()
        return Blob(path, oid, size, is_lfs)

    def add_folder(self, repo_id: str, folder: Path) -> None:
        """A public repository with the files of `folder`, which are moved."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
        files = {name: self.keep(path, name.endswith(LFS_SUFFIXES)) for name, path in zip(names, paths, strict=True)}
        self.repos[repo_id] = Repo(private=False)
        self.repos[repo_id].commit("main", files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository."""
        repo = self.repos[repo_id]
        return {name: blob.path.read_bytes() for name, blob in repo.commits[repo.branches[revision]].items()}


def inject(endpoint: str, method: str, path: str, fault: int | str, message: str = "", times: int = 1) -> None:
    """Add to the faults of a Hub from another process, see [`LocalHub`]. No faults of before are left."""
    body = json.dumps([[method, path, fault, message]] * times).encode()
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/_faults", body, method="POST")).close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_any(self) -> None:
        self.path_, _, self.query = unquote(self.path).partition("?")
        self.hub.requests.append((self.command, self.path_))
        fault = self._take_fault()
        if fault is not None and fault[0] == "cut" and self.command != "GET":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 1)))
            return self._cut()
        body = self._read_body()
        try:
            if fault is not None and fault[0] != "cut":
                raise HubError(int(fault[0]), fault[1])
            self._cut_halfway = fault is not None
            routes = (
                (answer, match.groupdict())
                for methods, pattern, answer in ROUTES
                if self.command in methods.split("|") and (match := re.fullmatch(pattern, self.path_))
            )
            answer, parts = next(routes, (None, None))
            if answer is None:
                raise HubError(404, f"Nothing at {self.command} {self.path_}")
            with self.hub.lock:
                result = answer(self, body, **parts)
            if result is not None:
                self._send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
        except HubError as error:
            content = json.dumps({"error": error.message, **getattr(error, "extra", {})}).encode()
            self._send(error.status, content, {"Content-Type": "application/json", **error.headers})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    # ---- Requests and answers ----

    def _take_fault(self) -> tuple[int | str, str] | None:
        with self.hub.lock:
            for place, (method, pattern, fault, message) in enumerate(self.hub.faults):
                if method == self.command and re.search(pattern, self.path_):
                    del self.hub.faults[place]
                    return fault, message
        return None

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut(self) -> None:
        """End the connection so that the other side gets an error, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # at once: the server would end it in order first
        self.close_connection = True

    def _send(self, status: int, content: bytes | Path, headers: dict[str, str]) -> None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if start:
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "_cut_halfway", False):
            self.wfile.write((content.read_bytes() if isinstance(content, Path) else content)[: size // 2])
            self.close_connection = True
            return
        if isinstance(content, Path):
            with open(content, "rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, self.wfile)
        else:
            self.wfile.write(content[start:])

    @property
    def role(self) -> str | None:
        """What the token admits to; no token, or an invalid one, nothing."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        role, repo = self.role, self.hub.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            status = 404 if role else 401
            raise HubError(status, "Repository not found" if role else "Invalid username or password.", "RepoNotFound")
        if write and (role != "write" or not repo_id.startswith(f"{USER}/")):
            raise HubError(403, f"You don't have the rights to write to {repo_id}: your token has the role {role!r}.")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # ---- The Hub's API ----

    def set_faults(self, body: bytes) -> dict:
        self.hub.faults = json.loads(body)
        return {}

    def whoami(self, body: bytes) -> dict:
        if self.role is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": self.role}}}

    def validate_yaml(self, body: bytes) -> dict:
        content = json.loads(body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1])
            bases = data.get("base_model") or []
            for base in [bases] if isinstance(bases, str) else bases:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                    raise ValueError(f'"base_model" with value "{base}" is not valid')
        except (ValueError, IndexError, AttributeError, yaml.YAMLError) as error:
            failure = HubError(400, "Invalid metadata")
            failure.extra = {"errors": [{"message": str(error)}]}
            raise failure from error
        return {"errors": [], "warnings": []}

    def create_repo(self, body: bytes) -> dict:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        repo_id = f"{owner}/{asked['name']}"
        if self.role is None:
            raise HubError(401, "Invalid username or password.")
        if self.role != "write" or owner != USER:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            exists = HubError(409, "You already created this model repo")
            exists.extra = {"url": url}
            raise exists
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n", is_lfs=False)})
        return {"url": url, "name": repo_id, "id": repo_id}

    def info(self, body: bytes, repo_id: str, revision: str | None) -> dict:
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        about = {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": siblings}
        return {**about, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}

    def refs(self, body: bytes, repo_id: str) -> dict:
        branches = self.repo(repo_id).branches.items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return {"branches": named, "tags": [], "converts": []}

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None) -> list:
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        prefix = f"{folder}/" if folder else ""
        found = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if not found:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries, folders = [], set()
        for name, blob in found.items():
            parents = [parent.as_posix() for parent in Path(name).parents if parent.as_posix().startswith(prefix)]
            is_deep = "/" in name.removeprefix(prefix)
            folders |= {parent for parent in parents if parent != "."}
            if "recursive=true" in self.query.lower() or not is_deep:
                entry = {"type": "file", "path": name, "oid": blob.oid, "size": blob.size}
                if blob.is_lfs:
                    entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 130}
                entries.append(entry)
        return entries + [{"type": "directory", "path": path, "oid": path, "size": 0} for path in sorted(folders)]

    def create_branch(self, body: bytes, repo_id: str, branch: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self.commit_of(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def preupload(self, body: bytes, repo_id: str, revision: str) -> dict:
        repo = self.repo(repo_id, write=True)
        present = repo.commits[self.commit_of(repo, revision)]

        def mode(asked: dict) -> dict:
            is_lfs = asked["path"].endswith(LFS_SUFFIXES)
            known = present.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            return {**answer, **({"oid": known.oid} if known else {})}

        return {"files": [mode(asked) for asked in json.loads(body)["files"]]}

    def lfs_batch(self, body: bytes, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        objects = json.loads(body)["objects"]
        for asked in objects:
            if not (self.hub.folder / asked["oid"]).exists():
                href = f"{self.hub.endpoint}/_lfs/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "Content does not match its digest")
        self.hub.keep(body, is_lfs=True)
        return {}

    def lfs_verify(self, body: bytes, oid: str) -> dict:
        path = self.hub.folder / oid
        if not path.exists() or path.stat().st_size != json.loads(body)["size"]:
            raise HubError(404, "Object was not uploaded")
        return {}

    def lfs_get(self, body: bytes, oid: str) -> None:
        self._send(200, self.hub.folder / oid, {"ETag": f'"{oid}"'})

    def commit(self, body: bytes, repo_id: str, branch: str) -> dict:
        repo = self.repo(repo_id, write=True)
        files = dict(repo.commits[self.commit_of(repo, branch)])
        for line in body.splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                path = self.hub.folder / value["oid"]
                if not path.exists():
                    raise HubError(400, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = Blob(path, value["oid"], path.stat().st_size, True)
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(branch, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        blob = repo.commits[oid].get(name)
        commit = {"X-Repo-Commit": oid}
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **commit)
        if blob.is_lfs:  # its bytes are on another host
            elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
            linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
            self._send(302, b"", {**commit, **linked, "Location": f"{elsewhere}/_lfs/{blob.oid}"})
        else:
            self._send(200, blob.path, {**commit, "ETag": f'"{blob.oid}"'})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", r"/_faults", _Handler.set_faults),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", rf"/api/models/{REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<branch>.+)", _Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET|HEAD", r"/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_get),
    ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
)
