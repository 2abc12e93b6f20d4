"""A twin of the hub on this machine: it answers what `datasets` and `huggingface_hub` ask about one dataset."""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubTwin:
    """Serve files of one dataset; as a context manager, from a thread.

    Attributes:
        files: Content by path in the repository.
        fail: Asked before each part of a file is sent, with its path and first byte: ``None`` to send it, ``"reset"``
            to close the connection, or a status to answer with.
        seen: Methods and paths asked for.
    """

    def __init__(self, repo: str, files: dict[str, bytes], fail=lambda path, start: None) -> None:
        self.repo, self.files, self.fail = repo, files, fail
        self.seen: list[str] = []

        class Handler(_Handler):
            twin = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def entry(self, path: str) -> dict:
        """Describe a file as the tree of a repository does."""
        content = self.files[path]
        return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}

    def tree(self, folder: str, *, recursive: bool) -> list[dict]:
        """List what a folder holds: its files and folders, or with everything in them."""
        root = f"{folder}/" if folder else ""
        found = {}
        for path in self.files:
            if path.startswith(root):
                names = path.removeprefix(root).split("/")
                for depth in range(1, len(names)):
                    inner = root + "/".join(names[:depth])
                    found[inner] = {
                        "type": "directory",
                        "oid": _oid(inner.encode()),
                        "size": 0,
                        "path": inner,
                    }
                found[path] = self.entry(path)
        depth = root.count("/")
        return [entry for path, entry in sorted(found.items()) if recursive or path.count("/") == depth]

    def info(self) -> dict:
        """Describe the repository."""
        return {
            "_id": "1",
            "id": self.repo,
            "author": self.repo.split("/")[0],
            "sha": COMMIT,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in self.files],
        }


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    twin: HubTwin
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer()

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(asked=asked)

    def _answer(self, *, body: bool = True, asked: bytes = b"") -> None:
        twin, path = self.twin, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        twin.seen.append(f"{self.command} {self.path}")
        api, resolve = f"/api/datasets/{twin.repo}", f"/datasets/{twin.repo}/resolve/"
        if path.startswith(resolve):
            _, _, name = path.removeprefix(resolve).partition("/")
            return self._file(name, body=body)
        if path == api or path.startswith(f"{api}/revision/"):
            return self._json(twin.info())
        if path.startswith(f"{api}/tree/"):
            _, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            entries = twin.tree(folder, recursive="recursive=true" in self.path.lower())
            return self._json(entries) if entries else self._missing("EntryNotFound")
        if path.startswith(f"{api}/paths-info/"):
            form = urllib.parse.parse_qs(asked.decode())
            names = form.get("paths") or json.loads(asked or b"{}").get("paths", [])
            return self._json([twin.entry(name) for name in names if name in twin.files])
        if path.startswith(f"{api}/refs"):
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            return self._json({"branches": [branch], "converts": [], "tags": [], "pullRequests": []})
        return self._missing("RepoNotFound")

    def _file(self, name: str, *, body: bool) -> None:
        content = self.twin.files.get(name)
        if content is None:
            return self._missing("EntryNotFound")
        start, end = 0, len(content)
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
        failure = self.twin.fail(name, start) if body else None
        if failure == "reset":
            self.close_connection = True
            self.connection.close()
            return None
        if failure is not None:
            return self._json({"error": "try again"}, status=failure)
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self.wfile.write(content[start:end])
        return None

    def _json(self, content, *, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
