"""Where a command runs: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rollouts.cli.progress import console
from rollouts.config import Count, settings
from rollouts.errors import ConfigError

if TYPE_CHECKING:
    from rollouts.cluster.pool import Cluster


@settings
class Machines:
    """Where a command runs.

    Attributes:
        ray: Run on Ray workers: ``local`` starts some on this machine, ``auto`` takes the cluster that this machine is
            part of, ``HOST:PORT`` another one.
        workers: How many; each has the models and GPUs of the models file.
    """

    ray: str | None = None
    workers: Count | None = None

    def __post_init__(self) -> None:
        """Refuse workers without a cluster."""
        if self.workers is not None and self.ray is None:
            raise ConfigError(
                "--workers is the number of workers of a cluster: say which, --ray local for this machine."
            )

    @contextmanager
    def cluster(self) -> Iterator[Cluster | None]:
        """Connect to the cluster; None: there is none."""
        if self.ray is None:
            yield None
            return
        from rollouts.cluster.pool import connected

        with connected(self.ray, self.workers or 1, lambda line: console().print(line, markup=False)) as cluster:
            yield cluster
