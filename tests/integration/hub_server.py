"""A Hugging Face Hub in a thread: the part of its HTTP API that pushing and loading a model use.

Everything is in memory and bound to 127.0.0.1. Requests and replies have the shapes that
huggingface_hub 1.x and 2.x exchange with the real one. Large files go through Git LFS: a server
that sends no X-Xet-* headers offers no Xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "me"
WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal: HTTP status, what a person reads, the Hub's X-Error-Code and other headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        sent = {"X-Error-Message": message, "X-Error-Code": code, **headers}
        body = json.dumps({"error": message}).encode()
        self.reply = Reply(body, status, {k.replace("_", "-"): v for k, v in sent.items() if v})


@dataclass
class Repo:
    """A model repository: immutable commits, and branches and pull requests that name them."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files) -> str:
        """Make `files` the whole content of `ref`; the new commit's id."""
        content = [self.refs.get(ref), *((path, oid(path, files[path])) for path in sorted(files))]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a pull request or a commit id names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> Files:
        """Content by path."""
        return self.commits[self.resolve(revision)]


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def oid(path: str, content: bytes) -> str:
    """A file's etag: the SHA-256 of an LFS file, else git's blob id."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """What the server holds and has seen.

    Attributes:
        url: where it listens.
        repos: repositories by "owner/name".
        uploaded: LFS files by SHA-256.
        requests: "METHOD path" of all requests, in order.
        unanswered: those that no route matched; if there are any, this server lags the client.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploaded: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """One connection: finds the route of each request; a method for each route."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)  # this handles the connection, to its end

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.hub.lock:
            try:
                reply = self._answer(f"{self.command} {urlsplit(self.path).path}")
            except HubError as error:
                reply = error.reply
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _answer(self, asked: str) -> Reply:
        self.hub.requests.append(asked)
        if self.token not in ("", READ_TOKEN, WRITE_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, asked):
                return route(self, *map(unquote, match.groups()))
        self.hub.unanswered.append(asked)
        raise HubError(404, f"no route for {asked}")

    def create_repo(self) -> Reply:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        self._check_write(name)
        created = name not in self.hub.repos
        if created:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return _json({"url": f"{self.hub.url}/{name}"}, 200 if created else 409)

    def whoami(self) -> Reply:
        if not self.token:
            raise HubError(401, "Invalid username or password.")
        role = "write" if self.token == WRITE_TOKEN else "read"
        token = {"displayName": "a token", "role": role}
        return _json({"name": USER, "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self) -> Reply:
        return _json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> Reply:
        repo = self._repo(name)
        siblings = [{"rfilename": path} for path in repo.files(revision)]
        sha = repo.resolve(revision)
        return _json({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> Reply:
        entries = []
        for path, content in self._repo(name).files(revision).items():
            entry = {"size": len(content), "oid": oid(path, content)}
            lfs = {"lfs": entry | {"pointerSize": 130}} if is_lfs(path) else {}
            entries.append({"type": "file", "path": path, **entry, **lfs})
        return _json(entries)

    def create_branch(self, name: str, branch: str) -> Reply:
        self._check_write(name)
        repo = self._repo(name)
        if branch in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.refs[branch] = repo.resolve(json.loads(self.body).get("startingPoint", "main"))
        return _json({})

    def preupload(self, name: str, revision: str) -> Reply:
        self._check_write(name)
        held = self._repo(name).files(revision)
        modes = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            known = oid(path, held[path]) if path in held else None
            mode = "lfs" if is_lfs(path) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return _json({"files": modes})

    def lfs_batch(self, name: str) -> Reply:
        self._check_write(name)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.uploaded:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, f"the content's SHA-256 is not {sha256}")
        self.hub.uploaded[sha256] = self.body
        return Reply()

    def commit(self, name: str, revision: str) -> Reply:
        self._check_write(name)
        repo = self._repo(name)
        files = dict(repo.files(revision))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.uploaded:
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif line["key"] != "header":
                raise HubError(400, f"can't commit {line}")
        done = {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision = f"refs/pr/{number}"
            done["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        sha = repo.commit(revision, files)
        return _json(done | {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def download(self, name: str, revision: str, path: str) -> Reply:
        repo = self._repo(name)
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        content = repo.commits[sha][path]
        etag, size = f'"{oid(path, content)}"', len(content)
        headers = {"ETag": etag, "X-Repo-Commit": sha}
        if is_lfs(path):
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Reply(content, 200, headers)
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(content[first : last + 1], 206, headers)

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _check_write(self, name: str) -> None:
        if self.token != WRITE_TOKEN:
            raise HubError(403 if self.token else 401, "you need a token with write permission")
        if name.split("/")[0] != USER:
            raise HubError(403, f"you don't have the rights to write to {name}")

    def log_message(self, *args: Any) -> None:
        """Nothing: `Hub.requests` is the log."""


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


REPO = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., Reply]]] = [
    ("POST /api/repos/create", Handler.create_repo),
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"GET /api/models/{REPO}", Handler.info),
    (f"GET /api/models/{REPO}/revision/([^/]+)", Handler.info),
    (f"GET /api/models/{REPO}/tree/([^/]+)", Handler.tree),
    (f"POST /api/models/{REPO}/branch/([^/]+)", Handler.create_branch),
    (f"POST /api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    (f"POST /api/models/{REPO}/commit/([^/]+)", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", Handler.lfs_put),
    (f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", Handler.download),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A running, empty Hub on a free port."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
