"""An OpenAI-compatible endpoint on loopback that answers, fails and breaks off as it is told."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-secret-that-no-file-may-hold"
DROPPED, TRUNCATED = "dropped connection", "truncated JSON"


class FakeEndpoint(ThreadingHTTPServer):
    """`reply(prompt, n)` says what the nth call for a prompt gets: (status, text), DROPPED or TRUNCATED.

    In place of the text, a dict has more of the reply's choice, or of its error, and bytes are the whole reply, of the
    type that `headers` names. Completions are told apart by their prompt, a text or token ids. `usage` says what was
    counted of a body.

    `refuses` is an option that calls may not have. `bodies` are the last call's, by the prompt.
    """

    daemon_threads = True

    def __init__(
        self,
        reply: Callable[[str, int], tuple[int, str | dict | None] | str],
        retry_after_ms: int | None = 1,
        refuses: str | None = None,
        refusal: dict | None = None,
        headers: dict[str, str] | None = None,
        usage: Callable[[dict], dict] = lambda body: {},
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.retry_after_ms, self.refuses = reply, retry_after_ms, refuses
        self.refusal, self.headers, self.usage = refusal or refuses, headers or {}, usage
        self.asked: list[str] = []
        self.bodies: dict[str, dict] = {}
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock, self.address = threading.Lock(), f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def told(self, body: dict) -> tuple[int, str | dict | None] | str:
        """Note a call, and give what it gets."""
        prompt = str(body["prompt"]) if "prompt" in body else "\n".join(each["content"] for each in body["messages"])
        with self.lock:
            self.bodies[prompt] = body
            self.asked.append(prompt)
            n = self.asked.count(prompt)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        found = (400, self.refusal) if self.refuses in body else self.reply(prompt, n)
        with self.lock:
            self.at_once -= 1
        return found

    def handle_error(self, *_):  # a client that was killed
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: apart, the second waits for the first to be acknowledged

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys |= {self.headers["Authorization"], self.headers["api-key"]} - {None}
        told = self.server.told(body)
        if told == DROPPED:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, text = (200, "Harmful") if told == TRUNCATED else told
        data = text if isinstance(text, bytes) else self._reply(body, status, text)
        data = data[: len(data) // 2] if told == TRUNCATED else data
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(data)}
        if self.server.retry_after_ms is not None:
            headers["retry-after-ms"] = self.server.retry_after_ms
        for name, value in (headers | self.server.headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _reply(self, body: dict, status: int, text: str | dict | None) -> bytes:
        answer = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        more, text = (text, None) if isinstance(text, dict) else ({}, text)
        answer["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"content": text}, "text": text} | more]
        answer["usage"] = self.server.usage(body)
        if status != 200:
            answer = {"error": {"message": f"refused {KEY}", "type": "error", "param": text} | more}
        return json.dumps(answer).encode()

    def do_GET(self):
        data = b'{"version": "1.2.3"}' if self.path == "/version" else b"{}"
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
