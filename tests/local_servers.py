"""A hub of datasets and a server of plain files on a free local port, which can hold a request."""

import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class LocalServers:
    """`/files/<path>`: the files under `root`, as a git server that knows nothing of git. Everything else: the hub.

    `datasets[id][revision]` are the files by name, the last revision is the newest. `asked` are the requests so far;
    number `hold` of them is answered only when `go` is set.
    """

    def __init__(self, root: Path):
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.hold, self.held, self.go = 0, threading.Event(), threading.Event()
        lock, servers = threading.Lock(), self

        class Handler(SimpleHTTPRequestHandler):
            def translate_path(self, path):
                return str(root / path.partition("?")[0].removeprefix("/files/"))

            def answer(self):
                with lock:
                    servers.asked.append(f"{self.command} {self.path}")
                    number = len(servers.asked)
                if number == servers.hold:
                    servers.held.set()
                    servers.go.wait(20)
                if self.path.startswith("/files/"):
                    return super().do_HEAD() if self.command == "HEAD" else super().do_GET()
                status, content, headers = servers.hub(unquote(self.path.partition("?")[0]))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = answer

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def hub(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of the hub's answer."""
        for name, revisions in self.datasets.items():
            api = f"/api/datasets/{name}"
            for revision, contents in revisions.items():
                if path in (api, f"{api}/revision/{revision}") and (path != api or revision == list(revisions)[-1]):
                    facts = {"id": name, "sha": revision, "private": False, "tags": [], "downloads": 0}
                    facts["siblings"] = [{"rfilename": file} for file in contents]
                    return 200, json.dumps(facts).encode(), {}
                if path.startswith(f"{api}/tree/{revision}"):
                    entries = [
                        {"type": "file", "path": file, "oid": etag(content), "size": len(content)}
                        for file, content in contents.items()
                    ]
                    return 200, json.dumps(entries).encode(), {}
                file = path.removeprefix(f"/datasets/{name}/resolve/{revision}/")
                if file in contents:
                    return 200, self.sends(contents[file]), {"ETag": etag(contents[file]), "X-Repo-Commit": revision}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    def sends(self, content: bytes) -> bytes:
        """What is sent of a dataset's file; a test may put something else in its place."""
        return content

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()


def etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
