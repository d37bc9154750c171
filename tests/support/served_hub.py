"""A hub on loopback: what huggingface_hub asks of the real one, answered as that answers, with faults on demand."""

import collections
import hashlib
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin", ".gguf")
"""Such files are stored elsewhere (on the hub by LFS): a redirect leads there, to another host."""


@dataclass
class Repository:
    """Commits (their files), what branches and tags stand at, and the token that its files want."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    private: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit, at which `refs` then stand."""
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag, or the beginning of a commit's name."""
        found = [sha for sha in self.commits if sha.startswith(revision)] if len(revision) >= 7 else []
        return self.refs.get(revision) or (found[0] if len(found) == 1 else None)


class Hub:
    """The served repositories; `asked` are the requests so far, `sent` the bytes of each path."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent: collections.Counter = collections.Counter()
        self.cuts: list[int] = []
        self.stall: threading.Event | None = None
        self.busy: list[int] = []
        self.spoil: set[str] = set()
        self.expired: set[str] = set()
        self.authorised_elsewhere = False
        self.url = self.elsewhere = ""

    def add(self, name: str, files: dict[str, bytes], *refs: str) -> str:
        """Commit files to a repository, made where there is none."""
        return self.repositories.setdefault(name, Repository()).commit(files, *refs)

    def forget(self) -> None:
        """Begin to count anew."""
        self.asked.clear()
        self.sent.clear()

    def downloaded(self) -> set[str]:
        """The paths of which something was sent."""
        return {path for path, count in self.sent.items() if count}


def etag(name: str, content: bytes) -> str:
    """A file's checksum as the hub says it: SHA-256 of large files, git's of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(hub: Hub):
    """Serve until the block ends; large files from another port, which is another host to a client."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.elsewhere = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append((self.command, path))
        if self.hub.busy:
            return self.error(self.hub.busy.pop(), None)
        for pattern, reply in (
            (r"/api/models/(.+?)/tree/(.+)", self.tree),
            (r"/api/models/(.+?)(?:/revision/(.+))?", self.info),
            (r"/elsewhere/([^/]+/[^/]+)/(\w{40})/(.+)", self.elsewhere),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                return reply(*found.groups())
        self.error(404, None)

    def repository(self, name, files=False):
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.expired:
            self.error(401, None, "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token != repository.token):
            self.error(401, "RepoNotFound" if token else None, "Invalid username or password.")
        elif files and repository.token and token != repository.token:
            self.error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repository
        return None

    def info(self, name, revision):
        if repository := self.repository(name):
            sha = repository.resolve(revision or "main")
            if sha is None:
                return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
            self.reply(200, json.dumps({"id": name, "modelId": name, "sha": sha, "siblings": siblings}).encode())

    def tree(self, name, revision):
        if repository := self.repository(name):
            listed = repository.commits[repository.resolve(revision)].items()
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": etag(path, data)} for path, data in listed
            ]
            self.reply(200, json.dumps(entries).encode())

    def resolve(self, name, revision, path):
        if repository := self.repository(name, files=True):
            sha = repository.resolve(revision)
            content = repository.commits[sha].get(path)
            if content is None:
                return self.error(404, "EntryNotFound", "Entry not found")
            told = {"X-Repo-Commit": sha, "ETag": f'"{etag(path, content)}"'}
            if not path.endswith(LARGE):
                return self.send(path, content, told)
            told |= {"X-Linked-Etag": told.pop("ETag"), "X-Linked-Size": str(len(content))}
            told["Location"] = f"{self.hub.elsewhere}/elsewhere/{name}/{sha}/{path}"
            self.reply(302, b"", told)

    def elsewhere(self, name, sha, path):
        self.hub.authorised_elsewhere |= "Authorization" in self.headers
        self.send(path, self.hub.repositories[name].commits[sha][path], {})

    def send(self, path, content, told):
        """A file, or the range of it that is asked for; a large one cut off as `hub.cuts` says next."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin, status = (int(found[1]), 206) if found else (0, 200)
        if path in self.hub.spoil:
            content = bytes(len(content))
        if found:
            told = told | {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        self.reply(status, content[begin:], told, path)

    def reply(self, status, body, told=(), path=None):
        self.send_response(status)
        for name, value in dict(told).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path and path.endswith(LARGE) and self.hub.cuts:
            body = body[: self.hub.cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()
        self.hub.sent[path] += len(body)
        if path and self.hub.stall and self.close_connection:
            self.hub.stall.wait()

    def error(self, status, code, message=""):
        self.reply(
            status, b"{}", {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        )
