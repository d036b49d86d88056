"""The command line of routers: ``python -m agents export RUN --out DIR``, ``serve --policy DIR``, ``demo``."""

from __future__ import annotations

import importlib
import sys

from agents.escape import terminal
from rollouts.errors import TrimError, did_you_mean, said

# by name: a module, imported when it is called, with run(config) -> int; its settings' class; what it does
COMMANDS = {
    "demo": ("agents.demo.command", "DemoConfig", "try it: a router before embedded models, and a page to ask it"),
    "export": ("agents.deploy.export", "ExportConfig", "write portable artefacts of the routers of a run"),
    "serve": ("agents.serve.command", "ServeConfig", "serve routers over HTTP"),
}


def usage() -> str:
    """Return what the command line offers."""
    lines = [f"  {name:8}{does}" for name, (_, _, does) in COMMANDS.items()]
    return "\n".join(["usage: python -m agents COMMAND ...", "", *lines, "", "COMMAND --help tells its settings."])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2, an interrupt exit code 130."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    try:
        if name not in COMMANDS:
            print(f"error: Unknown command {name!r}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
            return 2
        import tyro

        place, settings, _ = COMMANDS[name]
        module = importlib.import_module(place)
        rest = getattr(module, "with_file", list)(rest)
        config = tyro.cli(getattr(module, settings), prog=f"python -m agents {name}", args=rest)
        return int(module.run(config))
    except (ModuleNotFoundError, TrimError, OSError) as error:
        print(f"error: {terminal(said(error, 'rollouts'))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
