"""A small Hub server on this machine: the endpoints that huggingface_hub needs to download from it and to upload to it.

with LocalHub() as hub:
    hub.commit("me/model", {"config.json": b"{}"})     # or hub.commit("me/model", folder)
    hub.connect(monkeypatch, cache)                    # this process asks this Hub; or pass HF_ENDPOINT=hub.url

python examples/local_hub.py 8750                     # serves on that port until it is stopped
"""

import base64
import hashlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants, hf_api


class LocalHub:
    """Repositories in memory, served over HTTP.

    Attributes:
        url: of the server.
        commits: repository -> commit id -> path -> content.
        branches: repository -> branch or tag -> commit id.
        requests: (method, path) of every request, in order.
    """

    def __init__(self, port: int = 0):
        self.commits, self.branches, self.blobs, self.requests = {}, {}, {}, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Shut the server down: from now on the Hub cannot be reached. Twice is fine."""
        if self._server.fileno() >= 0:
            self._server.shutdown()
            self._server.server_close()

    def create(self, repo: str) -> None:
        """A repository with an empty first commit on `main`."""
        self.commits[repo], self.branches[repo] = {}, {"main": ""}
        self._store(repo, "main", {})

    def commit(self, repo: str, files: dict | Path, branch: str = "main", tag: str | None = None) -> str:
        """Add a folder's files, or path -> bytes, to a branch, new from `main` if need be; the commit's id."""
        if repo not in self.commits:
            self.create(repo)
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}
        sha = self._store(repo, branch, self.files(repo, branch) | files)
        if tag is not None:
            self.branches[repo][tag] = sha
        return sha

    def _store(self, repo, branch, files) -> str:
        sha = hashlib.sha1(f"{repo} {branch} {len(self.commits[repo])}".encode()).hexdigest()
        self.commits[repo][sha], self.branches[repo][branch] = files, sha
        return sha

    def sha(self, repo: str, revision: str) -> str | None:
        """The commit that a branch, tag or commit id names; None if there is none."""
        sha = self.branches[repo].get(revision, revision)
        return sha if sha in self.commits[repo] else None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """path -> content; a branch that is not there yet begins as `main`."""
        return self.commits[repo][self.sha(repo, revision) or self.branches[repo]["main"]]

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment of a process that asks this Hub and keeps what it downloads in `cache`."""
        added = {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
        return {**os.environ, **added, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def connect(self, monkeypatch, cache: Path) -> None:
        """Let this process ask this Hub; `monkeypatch` undoes it."""
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        # transformers keeps a client of its own, made at its first use: it would go on asking the Hub of another test.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        close_session()  # it may hold the proxies of before


class _Handler(BaseHTTPRequestHandler):
    """One request; `hub` is the LocalHub it belongs to."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if content is body else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, code: str, message: str, status: int = 404) -> None:
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def path_parts(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        return [unquote(part) for part in path.strip("/").split("/")]

    def found(self, repo: str, revision: str) -> str | None:
        """The commit asked for; None after an error was answered."""
        if repo not in self.hub.commits:
            return self.fail("RepoNotFound", "Repository not found")
        return self.hub.sha(repo, revision) or self.fail("RevisionNotFound", f"Invalid rev id: {revision}")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path_parts()
        if parts[:2] == ["api", "whoami-v2"]:
            return self.answer({"type": "user", "name": "me", "orgs": []})
        if parts[:2] == ["api", "models"]:
            repo, what, revision, inner = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"]), parts[6:]
            sha = self.found(repo, revision)
            return sha and (self.tree(repo, sha, "/".join(inner)) if what == "tree" else self.info(repo, sha))
        if parts[2:3] == ["resolve"]:
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.fail("NotFound", f"no such endpoint here: {self.path}")

    def info(self, repo: str, sha: str) -> None:
        siblings = [{"rfilename": path} for path in self.hub.files(repo, sha)]
        self.answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, repo: str, sha: str, inner: str) -> None:
        files = {p: c for p, c in self.hub.files(repo, sha).items() if not inner or p.startswith(f"{inner}/")}
        if inner and not files:
            return self.fail("EntryNotFound", f"{inner} does not exist")
        rows = [{"type": "file", "path": p, "size": len(c), "oid": _git_oid(c)} for p, c in files.items()]
        return self.answer(rows)

    def file(self, repo: str, revision: str, path: str) -> None:
        sha = self.found(repo, revision)
        if sha is None:
            return None
        content = self.hub.files(repo, sha).get(path)
        if content is None:
            return self.answer(
                {"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha,
                X_Error_Message="Entry not found",
            )  # fmt: skip
        return self.answer(content, ETag=f'"{_git_oid(content)}"', X_Repo_Commit=sha)

    def do_POST(self):
        parts, body = self.path_parts(), self.body()
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            wanted = json.loads(body)["objects"]
            href = f"{self.hub.url}/lfs/"
            objects = [o | {"actions": {"upload": {"href": href + o["oid"]}}} for o in wanted]
            return self.answer({"transfer": "basic", "objects": objects})
        repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "branch":
            self.hub.branches[repo][revision] = self.hub.branches[repo]["main"]
            return self.answer({})
        sha = self.found(repo, revision)
        if sha is None:
            return None
        if what == "preupload":
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": _upload_mode(f["path"])}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if what == "commit":
            return self.store(repo, revision, [json.loads(line) for line in body.splitlines()])
        return self.fail("NotFound", f"no such endpoint here: {self.path}")

    def do_PUT(self):
        oid, content = self.path_parts()[-1], self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail("BadRequest", "the content is not that of its oid", 400)
        self.hub.blobs[oid] = content
        return self.answer(b"")

    def create(self, asked: dict) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.hub.commits else 200
        if status == 200:
            self.hub.create(repo)
        self.answer({"url": f"{self.hub.url}/{repo}", "name": repo, "error": "You already created it"}, status)

    def store(self, repo: str, branch: str, lines: list[dict]) -> None:
        files = dict(self.hub.files(repo, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub._store(repo, branch, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})


def _upload_mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


if __name__ == "__main__":
    LocalHub(int(sys.argv[1]))._server.serve_forever()
