"""A real server of another project on loopback: `transformers serve`, which decodes with transformers' generate()."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PACKAGES = ("fastapi", "uvicorn")


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The base URL of a server for the length of a block. Models are served by their paths, from `folder` on."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no package {package}, which transformers serve needs (requirements-test.txt)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "transformers.cli.transformers", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert server.poll() is None, "transformers serve ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()
