"""Starts real vLLM servers on loopback for tests, and ends them with the test process."""

from __future__ import annotations

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from rollouts.tinymath import STEP_TAG, model_dir

_FORKS = Path(__file__).with_name("vllm_forks.py")
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


@dataclass(frozen=True)
class VllmServer:
    """A server.

    Attributes:
        model: Name it serves the model under.
        port: Port on 127.0.0.1.
        log: What it prints.
        flags: Those of its command line that are not all servers'.
    """

    model: str
    port: int
    log: Path
    flags: tuple[str, ...]

    @property
    def url(self) -> str:
        """Base URL for `ModelConfig.url`."""
        return f"http://127.0.0.1:{self.port}/v1"

    def loaded(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def tail(self, lines: int = 40) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def make(role: str, flags: Sequence[str] = ()) -> VllmServer:
    """Return a server of an embedded model, which nobody has started yet."""
    name = f"tinymath-{role}"
    log = Path(tempfile.mkstemp(prefix=f"vllm-{name}-", suffix=".log")[1])
    return VllmServer(name, free_port(), log, ("--model", str(model_dir(role)), *flags))


def make_prm() -> VllmServer:
    """Return a pooling server of the embedded reward model."""
    added = json.loads((model_dir("prm") / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    tag = next(token["id"] for token in added if token["content"] == STEP_TAG)
    pooler = json.dumps({"step_tag_id": tag, "returned_token_ids": [0, 1]})
    return make("prm", ("--runner", "pooling", "--pooler-config", pooler))


@contextmanager
def running(servers: Sequence[VllmServer]) -> Iterator[None]:
    """Start servers side by side, wait until all are loaded, and end them and their engines at once."""
    commands = [
        [str(each.log), *each.flags, "--served-model-name", each.model, "--port", str(each.port), *_FLAGS]
        for each in servers
    ]
    process = subprocess.Popen(
        [sys.executable, str(_FORKS), json.dumps(commands)],
        env={
            **{name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"},
            **_ENVIRONMENT,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    # A test process that is killed runs no exit handlers, and a server that is still loading ignores SIGTERM.
    watch = 'while kill -0 "$1"; do sleep 1; done; kill -9 -"$2"'
    arguments = ["/bin/sh", "-c", watch, "watch", str(os.getpid()), str(process.pid)]
    watcher = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + _START_S
        while not all(each.loaded() for each in servers):
            if process.poll() is not None or time.monotonic() > end:
                logs = "\n".join(f"{each.model}:\n{each.tail()}" for each in servers)
                raise RuntimeError(f"vLLM servers did not start (exit code {process.returncode}):\n{logs}")
            time.sleep(0.25)
        yield
    finally:
        watcher.kill()
        watcher.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class VllmServers(NamedTuple):
    """The embedded family, served."""

    small: VllmServer
    prm: VllmServer
    large: VllmServer


@pytest.fixture(scope="session")
def vllm_servers() -> Iterator[VllmServers]:
    """Servers of all three models of the embedded family, started once for all tests."""
    servers = VllmServers(make("small"), make_prm(), make("large"))
    with running(servers):
        yield servers
