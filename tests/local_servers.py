"""A git server and a hub of datasets on loopback, which note what they are asked and can hold a request."""

import hashlib
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalServers:
    """`/git/<name>` and `/dumb/<name>`: bare repositories under `root`, by git's own server and as mere files.

    Everything else: the hub. `datasets[id][revision]` are the files by name, the last revision is the newest; files of
    the endings in `large` go by sha256 there, others by git's blob id. `hold` is the number of the request that is
    answered only when `go` is set.
    """

    def __init__(self, root: Path):
        self.root, self.datasets, self.large = root, {}, (".parquet",)
        self.asked: list[str] = []
        self.hold, self.held, self.go = 0, threading.Event(), threading.Event()
        lock, servers = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            wbufsize = -1

            def answer(self):
                length = int(self.headers["Content-Length"] or 0)
                sent = self.rfile.read(length) if length else b""
                with lock:
                    servers.asked.append(f"{self.command} {self.path}")
                    number = len(servers.asked)
                if number == servers.hold:
                    servers.held.set()
                    servers.go.wait(20)
                path, _, query = self.path.partition("?")
                if path.startswith("/git/"):
                    servers.git(self, path.removeprefix("/git"), query, sent)
                elif path.startswith("/dumb/"):
                    file = servers.root / path.removeprefix("/dumb/")
                    self.reply(200, file.read_bytes()) if file.is_file() else self.reply(404)
                else:
                    servers.hub(self, unquote(path))

            do_GET = do_HEAD = do_POST = answer

            def reply(self, status: int, content: bytes = b"", **headers: str):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def git(self, request, path: str, query: str, sent: bytes) -> None:
        variables = {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "REQUEST_METHOD": request.command,
            "QUERY_STRING": query,
            "CONTENT_TYPE": request.headers["Content-Type"] or "",
            "CONTENT_LENGTH": str(len(sent)),
            "HTTP_CONTENT_ENCODING": request.headers["Content-Encoding"] or "",
            "GIT_PROTOCOL": request.headers["Git-Protocol"] or "",
        }
        done = subprocess.run(["git", "http-backend"], input=sent, capture_output=True, env=os.environ | variables)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        request.reply(int(headers.pop("Status", "200 OK").split()[0]), content, **headers)

    def hub(self, request, path: str) -> None:
        for name, revisions in self.datasets.items():
            newest = list(revisions)[-1]
            for revision, contents in revisions.items():
                if path == f"/api/datasets/{name}/revision/{revision}" or (
                    path == f"/api/datasets/{name}" and revision == newest
                ):
                    siblings = [{"rfilename": file, **self.entry(file, contents[file])} for file in contents]
                    found = {"id": name, "sha": revision, "private": False, "tags": [], "downloads": 0}
                    return request.reply(200, json.dumps(found | {"siblings": siblings}).encode())
                if path.startswith(f"/api/datasets/{name}/tree/{revision}"):
                    entries = [
                        {"type": "file", "path": file, "oid": "0" * 40, **self.entry(file, contents[file])}
                        for file in contents
                    ]
                    return request.reply(200, json.dumps(entries).encode())
                file = path.removeprefix(f"/datasets/{name}/resolve/{revision}/")
                if file in contents:
                    entry = self.entry(file, contents[file])
                    etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
                    return request.reply(200, self.sends(file, contents[file]), ETag=etag, X_Repo_Commit=revision)
        code = "RevisionNotFound" if any(f"/datasets/{name}/" in path for name in self.datasets) else "RepoNotFound"
        return request.reply(404, X_Error_Code=code)

    def sends(self, file: str, content: bytes) -> bytes:
        """What is sent for a file; a test may put something else in its place."""
        return content

    def entry(self, file: str, content: bytes) -> dict:
        """What the hub lists of a file."""
        entry = {"size": len(content), "blobId": blob_id(content)}
        if file.endswith(self.large):
            entry["lfs"] = {"size": len(content), "pointerSize": 130}
            entry["lfs"] |= dict.fromkeys(("sha256", "oid"), hashlib.sha256(content).hexdigest())  # one call, one name
        return entry

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
