"""Several vLLM servers as children of one process, which imports vLLM once for all of them and their engines.

``python vllm_forks.py '[["LOG", "--model", "MODEL", ...], ...]'`` ends as soon as one of them does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

# What servers and engines import while they start; vLLM says which goes first.
import vllm.v1.worker.cpu_worker  # noqa: F401  # isort: skip
import vllm.model_executor.models.qwen2  # noqa: F401
import vllm.model_executor.models.qwen2_rm  # noqa: F401
import vllm.v1.engine.async_llm  # noqa: F401
import vllm.v1.executor.uniproc_executor  # noqa: F401
from vllm.entrypoints.launchers.api_server import entry
from vllm.v1.engine import utils


def serve(log: str, *arguments: str) -> None:
    """Run one server, as ``python -m vllm.entrypoints.openai.api_server`` does."""
    with open(log, "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [entry.__file__, *arguments]
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    entry.main()


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        if not os.fork():
            try:
                serve(*given)
            finally:
                sys.exit(1)
    os.wait()
    sys.exit(1)
