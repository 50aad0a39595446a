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

import yaml

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
    """A model repository: immutable commits, and branches and pull requests that name them.

    `messages` has the title and the description of each commit.
    """

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, message: tuple[str, str] = ("", "")) -> str:
        """Make `files` the whole content of `ref`; the new commit's id."""
        content = [self.refs.get(ref), *((path, oid(path, files[path])) for path in sorted(files))]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.messages[sha] = message
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
        failures: regexes of requests that fail once: with a status, or cut off for None.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploaded: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    failures: dict[str, int | None] = field(default_factory=dict)
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
        asked = f"{self.command} {urlsplit(self.path).path}"
        with self.hub.lock:
            failure = next((p for p in self.hub.failures if re.fullmatch(p, asked)), None)
            status = self.hub.failures.pop(failure) if failure else 0
            if status is None:
                self.close_connection = True
                return
            try:
                if status:
                    raise HubError(status, "this once")
                reply = self._answer(asked)
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
        block = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        errors = card_errors(yaml.safe_load(block[1]) if block else None)
        found = {"errors": [{"message": text} for text in errors], "warnings": []}
        return _json(found, 400 if errors else 200)

    def info(self, name: str, revision: str = "main") -> Reply:
        repo = self._repo(name)
        siblings = [{"rfilename": path} for path in repo.files(revision)]
        sha = repo.resolve(revision)
        return _json({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str = "") -> Reply:
        if folder:  # no repository here has one
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for path, content in self._repo(name).files(revision).items():
            entry = {"size": len(content), "oid": oid(path, content)}
            lfs = {"lfs": entry | {"pointerSize": 130}} if is_lfs(path) else {}
            entries.append({"type": "file", "path": path, **entry, **lfs})
        return _json(entries)

    def refs(self, name: str) -> Reply:
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in self._repo(name).refs.items()
            if not ref.startswith("refs/")
        ]
        return _json({"branches": branches, "converts": [], "tags": []})

    def create_branch(self, name: str, branch: str) -> Reply:
        self._check_write(name)
        repo = self._repo(name)
        if branch in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.refs[branch] = repo.resolve(json.loads(self.body).get("startingPoint", "main"))
        return _json({})

    def preupload(self, name: str, revision: str) -> Reply:
        self._check_write(name, proposed=self._proposes())
        held = self._repo(name).files(revision)
        modes = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            known = oid(path, held[path]) if path in held else None
            mode = "lfs" if is_lfs(path) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return _json({"files": modes})

    def lfs_batch(self, name: str) -> Reply:
        self._check_write(name, proposed=True)  # it isn't told what for
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
        self._check_write(name, proposed=self._proposes())
        repo = self._repo(name)
        files = dict(repo.files(revision))
        message = ("", "")
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.uploaded:
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "header":
                message = value["summary"], value["description"]
            else:
                raise HubError(400, f"can't commit {line}")
        done = {}
        if self._proposes():
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision = f"refs/pr/{number}"
            done["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        sha = repo.commit(revision, files, message)
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

    def _proposes(self) -> bool:
        return "create_pr=1" in urlsplit(self.path).query

    def _check_write(self, name: str, proposed: bool = False) -> None:
        """Only the owner may write; anyone may propose a commit as a pull request."""
        if self.token != WRITE_TOKEN:
            raise HubError(403 if self.token else 401, "you need a token with write permission")
        if name.split("/")[0] != USER and not proposed:
            raise HubError(403, f"you don't have the rights to write to {name}")

    def log_message(self, *args: Any) -> None:
        """Nothing: `Hub.requests` is the log."""


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


RELATIONS = ("adapter", "finetune", "merge", "quantized")


def card_errors(data: Any) -> list[str]:
    """What the Hub has against a model card's metadata, as far as these tests go.

    The rules are those of its documentation: ids of repositories, the four relations, and the
    model-index of the old Papers with Code.
    """
    if not isinstance(data, dict):
        return ["the card has no metadata"]
    errors = []
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid')
    if data.get("base_model_relation", "merge") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for entry in data.get("model-index", []):
        if not (isinstance(entry.get("name"), str) and entry.get("results")):
            errors.append('"model-index[0].name" and "results" are required')
            continue
        for result in entry["results"]:
            strings = [
                result["task"].get("type"),
                *(result["dataset"].get(key) for key in ("name", "type")),
                *(metric.get("type") for metric in result["metrics"]),
            ]
            numbers = [metric.get("value") for metric in result["metrics"]]
            if not all(isinstance(text, str) and text for text in strings):
                errors.append('"model-index" has a result without task, dataset or metric type')
            if not all(isinstance(number, int | float) for number in numbers):
                errors.append('"model-index" has a metric without a value')
    return errors


REPO = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., Reply]]] = [
    ("POST /api/repos/create", Handler.create_repo),
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"GET /api/models/{REPO}", Handler.info),
    (f"GET /api/models/{REPO}/refs", Handler.refs),
    (f"GET /api/models/{REPO}/revision/([^/]+)", Handler.info),
    (f"GET /api/models/{REPO}/tree/([^/]+)", Handler.tree),
    (f"GET /api/models/{REPO}/tree/([^/]+)/(.+)", Handler.tree),
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
