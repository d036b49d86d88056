"""The command line of rollouts: ``python -m rollouts generate my-trees --problems tinymath:test --limit 20``."""

from __future__ import annotations

import signal
import sys

from rollouts.errors import TrimError, said


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        import tyro

        from rollouts.cli.generate import COMMANDS

        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m rollouts", description=__doc__, args=arguments
        )
        command.run()
    except (ModuleNotFoundError, TrimError, OSError) as error:
        print(f"error: {said(error, 'rollouts')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; everything so far is kept, the same command goes on from here"
        print(told, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems end jobs so: keep what there is
    sys.exit(main())
