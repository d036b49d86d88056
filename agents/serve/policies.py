"""The policies of a service: each by its name, some of the rest by a hash of the request, read again while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256

from agents.deploy.policy import Policy, load
from agents.serve.api import ApiError
from agents.serve.config import ServeConfig
from agents.serve.sources import Sources, sources_of
from rollouts.errors import ConfigError, did_you_mean

_BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)  # shares of always-large's cost that the model list names


@dataclass(frozen=True)
class Policies:
    """Policies by the names that clients ask for; the first is that of requests that name none.

    Attributes:
        sources: What each reads, and from where.
        shares: Shares of the requests that name none and that others than the first get.
        usual: λ and budget of requests that name neither, as ``--lam`` and ``--budget`` say; of several policies those
            with one setting keep theirs.
    """

    each: Mapping[str, Policy]
    sources: Mapping[str, Sources]
    shares: Mapping[str, float]
    usual: Mapping[str, tuple[float | None, float | None]]

    @classmethod
    def load(cls, config: ServeConfig) -> Policies:
        """Read the policies of a service.

        Raises:
            TrimError: One cannot be used, two have one name, or shares are none.
        """
        first = load(config.policy, allow_old=config.allow_old)
        each = {config.name or first.name: first}
        for name, folder in (_pair(text, "--also", "NAME=DIR") for text in config.also):
            if name in each or "@" in name:
                raise ConfigError(f"--also {name}={folder}: the name is taken, or has an @; choose another.")
            each[name] = load(folder, allow_old=config.allow_old)
        shares = {}
        for name, text in (_pair(text, "--ab", "NAME=SHARE") for text in config.ab):
            with suppress(ValueError):
                shares[name] = float(text)
            if name not in list(each)[1:]:
                raise ConfigError(f"--ab {name}={text}: no policy of --also.{did_you_mean(name, list(each)[1:])}")
        if len(shares) < len(config.ab) or not all(
            0 <= share <= sum(shares.values()) <= 1 for share in shares.values()
        ):
            raise ConfigError(f"--ab {' '.join(config.ab)}: expected shares that sum up to at most 1, each name once.")
        ranges = any(policy.lam_range for policy in each.values())
        usual = {
            name: (config.lam, config.budget) if policy.lam_range or not ranges else (None, None)
            for name, policy in each.items()
        }
        for name, policy in each.items():
            _check_setting(policy, usual[name], name if config.also else "")
        return cls(each, {name: sources_of(policy) for name, policy in each.items()}, shares, usual)

    @property
    def first(self) -> Policy:
        """The policy of requests that name none."""
        return next(iter(self.each.values()))

    @property
    def read(self) -> Sources:
        """What all of them read together; raises `ConfigError` if two read scores of two reward models."""
        return reduce(_joined, self.sources.values())

    def covers(self, others: Policies) -> bool:
        """Whether upstreams that were asked what these read can tell what others read."""
        own, wanted = self.read, others.read
        same = own.table == wanted.table or not wanted.scorer
        return same and all(getattr(own, name) or not getattr(wanted, name) for name in ("scorer", "small", "large"))

    def named(self, model: str | None) -> tuple[str | None, dict[str, float]]:
        """Return whom a model's name means, and what it says beside it: ``trim@budget=0.2``; None: whoever it is.

        Raises:
            ApiError: There is no such model.
        """
        if model is None or model in self.each:
            return (None if model == next(iter(self.each)) else model), {}
        name, _, setting = model.rpartition("@")
        knob, _, value = setting.partition("=")
        if name in self.each and knob in ("lam", "budget"):
            with suppress(ValueError):
                return name, {knob: float(value)}
        valid = ", ".join(self.names())
        raise ApiError(404, f"The model `{model[:200]}` does not exist. Valid: {valid}.", "NotFoundError", "model")

    def drawn(self, text: str) -> str:
        """Return whose a request is that names nobody, by a hash of it: the same text, the same policy."""
        position, others = (
            int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64,
            0.0,
        )
        for name, share in self.shares.items():
            others += share
            if position < others:
                return name
        return next(iter(self.each))

    def names(self) -> list[str]:
        """Return the names that the model list has: with settings, where a policy takes one."""
        found = []
        for own, policy in self.each.items():
            least, most = policy.budget_range or (1.0, 0.0)
            found += [own, *(f"{own}@budget={budget:g}" for budget in _BUDGETS if least <= budget <= most)]
        return found


def _check_setting(policy: Policy, usual: tuple[float | None, float | None], name: str) -> None:
    """Raise `ConfigError` unless requests without a setting of their own can be served."""
    try:
        policy.session(*usual)
    except ConfigError as error:
        hint = "" if usual != (None, None) else " That is for requests that name neither: --lam or --budget."
        raise ConfigError(f"{name}{': ' if name else ''}{error}{hint}") from error


def _pair(text: str, flag: str, form: str) -> Sequence[str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise ConfigError(f"{flag} is {text!r}, expected {form}.")
    return name, value


def _joined(one: Sources, other: Sources) -> Sources:
    if one.scorer and other.scorer and one.table != other.table:
        raise ConfigError(f"The policies read scores of {one.table} and of {other.table}; serve them apart.")
    table = other.table if other.scorer and not one.scorer else one.table
    return Sources(table, one.scorer or other.scorer, one.small or other.small, one.large or other.large)
