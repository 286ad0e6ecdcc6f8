"""An OpenAI-compatible endpoint on loopback that answers, fails and breaks off as it is told."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-secret-that-no-file-may-hold"
DROPPED, TRUNCATED = "dropped connection", "truncated JSON"


class FakeEndpoint:
    """`reply(prompt, n)` says what the nth call for a prompt gets: (status, text), DROPPED or TRUNCATED.

    `refuses` is an option that calls may not have.
    """

    def __init__(
        self,
        reply: Callable[[str, int], tuple[int, str | None] | str],
        retry_after_ms: int | None = 1,
        remembers: bool = True,
        refuses: str | None = None,
    ):
        self.asked: list[str] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        lock, endpoint, counts = threading.Lock(), self, Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: apart, the second waits for the first to be acknowledged

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    if remembers:
                        endpoint.asked.append(prompt)
                        counts[prompt] += 1
                    endpoint.keys |= {self.headers["Authorization"], self.headers["api-key"]} - {None}
                    n = counts[prompt]
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                told = (400, refuses) if refuses in body else reply(prompt, n)
                with lock:
                    endpoint.at_once -= 1
                if told == DROPPED:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, text = (200, "Harmful") if told == TRUNCATED else told
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                answer = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
                answer |= {"choices": [choice]}
                if status != 200:
                    answer = {"error": {"message": f"refused {KEY}", "type": "error", "param": text}}
                data = json.dumps(answer).encode()
                data = data[: len(data) // 2] if told == TRUNCATED else data
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if retry_after_ms is not None:
                    self.send_header("retry-after-ms", str(retry_after_ms))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
