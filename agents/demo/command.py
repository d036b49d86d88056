"""``python -m agents demo``: a router, three embedded models and the playground, on this machine alone.

The router is the package's own (`agents/demo/router`), trained on the bundled rollouts by

    python train.py --agent exact --lam-range 4e-4 1.2e-2 --tracking none --out runs/demo
    python -m agents export runs/demo --out agents/demo/router
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

from rollouts.config import settings

_HOST = "127.0.0.1"
_USUAL = 8080
_BUDGET = 0.25  # of requests that name none


@settings
class DemoConfig:
    """Try the service: a router before three tiny models that run here, with a page to ask it.

    Attributes:
        port: Port; left out: 8080, or any that is free where that is taken.
        open: Open the page in a browser, where there is a display.
    """

    port: int | None = None
    open: bool = True


def run(config: DemoConfig) -> int:
    """Serve until interrupted; return the exit code.

    Raises:
        TrimError: The port is taken, or the models cannot be loaded.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    began = time.monotonic()
    port = _port(config.port)
    print("Loading a small model, a large model and a reward model: some ten seconds.", flush=True)
    from agents.demo.models import load, served
    from agents.serve.command import Server
    from agents.serve.config import ServeConfig

    with socket.create_server((_HOST, 0)) as listening, ThreadPoolExecutor(1) as beside:
        url = f"http://{_HOST}:{listening.getsockname()[1]}"
        small, large, prm = ((f"{url}/{role}/v1",) for role in ("small", "large", "prm"))
        router = str(files("agents.demo") / "router")
        asked = ServeConfig(
            policy=router, small=small, large=large, prm=prm, port=port, budget=_BUDGET, playground=True
        )
        made = beside.submit(Server, asked)  # while the models are loaded
        with load() as backend, served(backend, listening):
            server = made.result()
            print(f"Ready after {time.monotonic() - began:.0f} s; Ctrl-C ends it.", flush=True)
            if config.open and (browser := _browser()):
                page = server.url.removesuffix("v1")
                threading.Thread(target=browser.open, args=(page,), daemon=True).start()
            server.run()
            return server.exit_code


def _port(asked: int | None) -> int:
    """Return the port to listen on: the usual one where it is free, else any."""
    if asked is not None:
        return asked
    try:
        socket.create_server((_HOST, _USUAL)).close()
    except OSError:
        return 0
    return _USUAL


def _browser() -> webbrowser.BaseBrowser | None:
    """Return a browser with a window of its own, if the user sits before this machine and has one."""
    windows = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not windows or os.environ.get("SSH_CONNECTION"):
        return None
    try:
        found = webbrowser.get()
    except webbrowser.Error:
        return None
    in_terminal = type(found) is webbrowser.GenericBrowser and not os.environ.get("BROWSER")
    return None if in_terminal else found
