"""One store from one accelerator by the clock, and what it took: tokens by role, memory, idle time.

    python -m benchmarks.device --models models.toml --problems gsm8k.jsonl --minutes 6 --out out
    python -m benchmarks.device --problems tinymath:test --limit 2 --minutes 2 --out out   # a dry run on a CPU

Generation is stopped by the clock as Ctrl-C stops it. ``out/store.tar.gz`` is renewed every minute, so that little is
lost where the machine goes away; the same command goes on with ``out/store``. ``out/device.md`` has the figures.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import tyro

from rollouts.store.store import Store
from rollouts.text.steps import ROLES

_ROLLOUTS = (sys.executable, "-m", "rollouts")


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: Directory of store, archive and figures.
        models: TOML file of the roles, or ``tinymath:transformers``.
        problems: As `python -m rollouts generate` takes them.
        minutes: Time for generation, loading of the models included.
        max_escalations: K of the trees.
        limit: Most problems of each split.
        score: Score what was generated, too, however long it takes; without scores there are no statistics.
        archive_seconds: How often the archive is renewed.
    """

    out: Path
    models: str = "tinymath:transformers"
    problems: str = "tinymath:test"
    minutes: float = 6.0
    max_escalations: int = 2
    limit: int | None = None
    score: bool = True
    archive_seconds: float = 60.0


class Watch:
    """Looks at the accelerator once a second; without one it sees nothing."""

    def __init__(self) -> None:
        """Begin."""
        self.used: list[tuple[float, float]] = []  # (utilisation in %, memory in MiB) of each second
        self.name = "no accelerator"
        self._process: subprocess.Popen[str] | None = None
        if (tool := shutil.which("nvidia-smi")) is None:
            return
        query = [tool, "--format=csv,noheader,nounits"]
        self.name = subprocess.run([*query, "--query-gpu=name"], capture_output=True, text=True).stdout.strip()
        seen = [*query, "--query-gpu=utilization.gpu,memory.used", "--loop=1"]
        self._process = subprocess.Popen(seen, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a sample that the driver does not have
                share, memory = map(float, line.split(","))
                self.used.append((share, memory))

    def end(self) -> None:
        """Look no more."""
        if self._process is not None:
            self._process.terminate()


def written(place: Path) -> dict[str, tuple[int, int]]:
    """Return for each role how many steps and tokens a store holds; nothing before it has been begun."""
    if not (place / "manifest.json").exists():
        return {}
    found: dict[str, tuple[int, int]] = {}
    for table in Store(place).steps.read(columns=["role", "tokens"]):
        for role in ROLES:
            of_role = table.filter(pc.equal(table["role"], role))
            steps, tokens = found.get(role, (0, 0))
            found[role] = steps + of_role.num_rows, tokens + (pc.sum(of_role["tokens"]).as_py() or 0)
    return found


def archive(out: Path) -> None:
    """Renew the archive of the store; a reader finds the old one or the new one."""
    place = out / "store.tar.gz"
    unfinished = place.with_suffix(".tmp")
    with contextlib.suppress(FileNotFoundError):  # a shard was replaced meanwhile: the next one has it
        with tarfile.open(unfinished, "w:gz") as tar:
            tar.add(out / "store", "store")
        unfinished.replace(place)


def generate(settings: Settings) -> list[tuple[float, dict[str, tuple[int, int]]]]:
    """Generate until the time is over; return what there was when, in seconds since the start."""
    store = settings.out / "store"
    line = [*_ROLLOUTS, "generate", store, "--problems", settings.problems, "--models", settings.models]
    line += ["--max-escalations", settings.max_escalations, "--no-score", "--no-grade", "--flush-seconds", 5]
    line += [] if settings.limit is None else ["--limit", settings.limit]
    began, archived = time.monotonic(), 0.0
    seen = [(0.0, written(store))]
    with subprocess.Popen(list(map(str, line))) as process:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            now = time.monotonic() - began
            seen.append((now, written(store)))
            if now > 60 * settings.minutes and process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            if now - archived > settings.archive_seconds and store.exists():
                archived = now
                archive(settings.out)
    if process.returncode not in (0, 130):
        raise SystemExit(f"Generation ended with code {process.returncode}.")
    return [*seen, (time.monotonic() - began, written(store))]


def report(settings: Settings, seen: list[tuple[float, dict[str, tuple[int, int]]]], watch: Watch) -> str:
    """Return what the run took as Markdown."""
    steps = [sum(count for count, _ in each.values()) for _, each in seen]
    first = next((at for at, count in enumerate(steps) if count > steps[0]), len(seen) - 1)
    first = max(first - 1, 0)  # the sample before the first new steps: loading is over by then, or nearly
    (begin, before), (end, after) = seen[first], seen[-1]
    seconds = max(end - begin, 1e-9)
    lines = [f"# {watch.name}", "", f"`python -m benchmarks.device {' '.join(sys.argv[1:])}`", ""]
    lines += [f"{end:.0f} s of generation, {begin:.0f} of them before the first steps were stored.", ""]
    lines += ["| role | steps | tokens | tokens/s |", "|---|---:|---:|---:|"]
    for role in ROLES:
        old, new = before.get(role, (0, 0)), after.get(role, (0, 0))
        lines.append(f"| {role} | {new[0]:,} | {new[1]:,} | {(new[1] - old[1]) / seconds:,.0f} |")
    if watch.used:
        share, memory = np.array(watch.used).T
        idle = 100 * (share == 0).mean()
        lines += ["", f"Accelerator: idle {idle:.0f} % of the seconds, used {share.mean():.0f} % on average;"]
        lines += [f"memory {memory.max() / 1024:.1f} GiB at most."]
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> None:
    """Generate, then grade, tell and check; score if asked."""
    settings.out.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    seen = generate(settings)
    watch.end()
    (settings.out / "device.md").write_text(text := report(settings, seen, watch))
    print(text)
    archive(settings.out)
    scoring = [["score", "--models", settings.models]] if settings.score else []
    for command, *more in [["grade"], *scoring, ["verify"], *([["stats"]] if settings.score else [])]:
        ended = subprocess.run([*_ROLLOUTS, command, str(settings.out / "store"), *more])
        archive(settings.out)
        if ended.returncode:
            raise SystemExit(f"`rollouts {command}` ended with code {ended.returncode}.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
