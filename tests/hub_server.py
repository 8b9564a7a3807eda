"""A Hub on the loopback interface: what the huggingface_hub client needs for downloads, uploads and tags.

Small files are git blobs; ``.safetensors`` and ``.onnx`` are LFS objects behind a redirect to another host,
as on the real Hub. Faults can be switched on.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".onnx")


@dataclass
class Repo:
    """Content by commit; ``main`` and the tags point to commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, changes: dict[str, bytes], branch: str = "main") -> str:
        files = {**self.commits.get(self.refs.get(branch, ""), {}), **changes}
        text = f"{len(self.commits)}{sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass
class Fault:
    """What goes wrong: ``kind`` for the next ``times`` requests whose ``"METHOD /path"`` matches the pattern.

    Kinds: a status such as "503"; "drop" (close without an answer); "truncate" (close after half of the
    content); "wrong" (other content of the same length); "slow" (wait a little); "endless" (chunks without end).
    """

    pattern: str
    kind: str
    times: int = 1


class Hub:
    """The server; ``url`` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.headers: dict[str, str] = {}  # in place of those of every file's answer
        self.log: list[str] = []
        self.authorization: set[str] = set()
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage_url = f"http://localhost:{port}"  # the client follows redirects to its own host at once
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, pattern: str, kind: str, times: int = 1) -> None:
        self.faults.append(Fault(pattern, kind, times))

    def next_fault(self, request: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.kind
        return ""

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]


class _Handler(http.server.BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.state.log.append(request + (f" {self.headers['Range']}" if self.headers["Range"] else ""))
        if self.headers["Authorization"]:
            self.state.authorization.add(f"{request} {self.headers['Authorization']}")
        size = int(self.headers["Content-Length"] or 0)
        self.body = self.rfile.read(size) if size else self.read_chunks()
        self.mangle: Callable[[bytes], bytes] = lambda content: content
        self.cut = self.endless = False
        kind = self.state.next_fault(request)
        if kind == "drop":
            self.close_connection = True
            return None
        if kind == "slow":
            time.sleep(0.3)
        elif kind == "truncate":
            self.cut = True
        elif kind == "endless":
            self.endless = True
        elif kind == "wrong":
            self.mangle = lambda content: bytes(len(content))
        elif kind:
            return self.answer(int(kind), b"{}")
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, **match.groupdict())
        self.answer(404, b"{}")
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_chunks(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return b""
        content = b""
        while length := int(self.rfile.readline(), 16):
            content += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        content = self.mangle(content)
        self.send_response(status)
        length = {"Transfer-Encoding": "chunked"} if self.endless else {"Content-Length": str(len(content))}
        changed = self.state.headers if "/resolve/" in self.path else {}
        for key, value in {**length, **(headers or {}), **changed}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.endless:
            self.close_connection = True
            with contextlib.suppress(OSError):
                for _ in range(1 << 12):  # 256 MiB are enough
                    self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            return
        if self.cut:
            self.close_connection = True
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # ---- downloads ----

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files; answers with the Hub's errors where there are none."""
        found = self.state.repos.get(repo)
        if found is None or (found.private and not self.headers["Authorization"]):
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if found.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, found.commits[commit]

    def resolve(self, repo: str, revision: str, file: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return None
        commit, files = found
        if file not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[file]
        if file.endswith(LFS):
            digest = hashlib.sha256(content).hexdigest()
            self.state.lfs[digest] = content
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.state.storage_url}/lfs/{digest}",
            }
            return self.answer(302, b"", headers)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.send_ranged(content, {"X-Repo-Commit": commit, "ETag": f'"{blob}"'})
        return None

    def lfs_object(self, digest: str) -> None:
        self.send_ranged(self.state.lfs[digest], {"ETag": f'"{digest}"'})

    def send_ranged(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        headers["Accept-Ranges"] = "bytes"
        if not match:
            return self.answer(200, content, headers)
        start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], headers)
        return None

    # ---- uploads ----

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.state.repos:
            return self.json({"url": f"{self.state.url}/{name}"}, 409)
        self.state.repos[name] = Repo(
            private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        self.state.repos[name].commit({".gitattributes": b""})
        self.json({"url": f"{self.state.url}/{name}"})
        return None

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        self.json({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.state.lfs:
                answer["actions"] = {"upload": {"href": f"{self.state.url}/upload/{wanted['oid']}"}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.answer(400)
        self.state.lfs[digest] = self.body
        self.answer(200)
        return None

    def make_branch(self, repo: str, revision: str) -> None:
        refs = self.state.repos[repo].refs
        if revision in refs:
            return self.answer(409, b"{}")
        refs[revision] = refs["main"]
        self.json({})
        return None

    def make_commit(self, repo: str, revision: str) -> None:
        if revision not in self.state.repos[repo].refs:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        changes = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.state.lfs[value["oid"]]
        commit = self.state.repos[repo].commit(changes, revision)
        self.json({"commitUrl": f"{self.state.url}/{repo}/commit/{commit}", "commitOid": commit})
        return None

    def make_tag(self, repo: str, revision: str) -> None:
        refs = self.state.repos[repo].refs
        tag = json.loads(self.body)["tag"]
        if tag in refs:
            return self.answer(409, b"{}")
        refs[tag] = refs.get(revision, revision)
        self.json({})
        return None

    def delete_tag(self, repo: str, revision: str) -> None:
        self.state.repos[repo].refs.pop(revision)
        self.json({})

    def validate_yaml(self) -> None:
        self.json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo, revision)
        if found is not None:
            self.json({"id": repo, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (("GET", "HEAD"), r"/lfs/(?P<digest>\w+)", _Handler.lfs_object),
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/upload/(?P<digest>\w+)", _Handler.lfs_upload),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.make_commit),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.make_branch),
    (("POST",), rf"/api/models/{_REPO}/tag/(?P<revision>[^/]+)", _Handler.make_tag),
    (("DELETE",), rf"/api/models/{_REPO}/tag/(?P<revision>[^/]+)", _Handler.delete_tag),
    (("GET",), rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler.info),
]
