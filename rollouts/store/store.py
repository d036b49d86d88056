"""A rollout store: a directory with a manifest, problems, generated steps, and tables of scores and grades."""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date as Date
from itertools import chain
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from rollouts.errors import StoreError, did_you_mean
from rollouts.files.parquet import open_parquet, write_parquet
from rollouts.files.sealed import read_sealed, refusing_damage, write_sealed
from rollouts.store.rows import RowKey, Rows, TreeKey, contents_of
from rollouts.store.shards import GRADES, KEY, MANY, STEPS, Table, scores_of, values_of
from rollouts.tasks.problems import Problem
from rollouts.text.likelihood import LOOKED_AT, STATISTICS, as_score, first_of
from rollouts.text.splitting import BLANK_LINE, Splitting, splitting_of
from rollouts.text.steps import ROLES, SMALL, StopReason

SCHEMA_VERSION = 2  # with steps that do not end at blank lines; else 1
_USUAL: dict[str, tuple[str, ...]] = {
    "columns": ("score",),
    "roles": ROLES,
}  # of tables whose manifest says nothing else
_PROBLEMS = pa.schema([(name, pa.string()) for name in ("id", "split", "question", "answer", "source", "licence")])


_LOCK, _LIVE, _SET_ASIDE = ".lock", "live.json", "set-aside"
_RESTORE = "Restore it from a copy."
BUNDLED = Path(__file__).parents[1] / "datasets"


def locate(path: str | Path) -> Path:
    """Return a store's directory: the path itself, or the bundled store of that name where no such path exists."""
    bundled = BUNDLED / path
    return bundled if not Path(path).exists() and (bundled / "manifest.json").is_file() else Path(path)


class Store:
    """A rollout dataset on disk (docs/design.md, section 3); readable by any Parquet tool.

    Attributes:
        manifest: What was agreed when it was made; see `Store.create`.
        steps: Table of generated steps.
        notes: What whoever goes on with it should be told.
    """

    def __init__(self, path: str | Path) -> None:
        """Open an existing store.

        Args:
            path: Its directory, or the name of a bundled one (``quickstart``).

        Raises:
            StoreError: There is none, or its manifest is damaged or newer than this version.
        """
        self.path = locate(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            bundled = did_you_mean(str(path), (each.parent.name for each in BUNDLED.glob("*/manifest.json")))
            raise StoreError(f"{self.path}: no rollout store here (no manifest.json). Make one with "
                             f"`python -m rollouts generate`, or name a bundled one.{bundled}")  # fmt: skip
        self.manifest = _read_manifest(file)
        version = self.manifest["schema_version"]
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise StoreError(
                f"{file}: schema version {version!r}, this version reads up to {SCHEMA_VERSION}. Upgrade trim-routing."
            )
        self.steps = Table(self.path / "steps", STEPS)
        self.notes: list[str] = []
        self._tables: dict[tuple[Any, ...], Table] = {}  # kept, as each knows where its rows are

    @classmethod
    def create(cls, path: str | Path, process: Mapping[str, Any], date: Date | None = None) -> Store:
        """Make a store, or open the one that is there if it was made by the same process.

        Args:
            path: Directory; made if needed.
            process: What decides the distribution of the rows: models, sampling, prompts, limits, K. What tells the
                models from others of their names (`rollouts.models.identity`) comes by role under ``identities``; it is
                kept beside the process, and compared where both sides know it.
            date: Date of a new store, which its prompts keep; default: today.

        Raises:
            StoreError: A store made by another process is there; the message names the fields that differ.
        """
        path = Path(path)
        file = path / "manifest.json"
        if not file.exists():
            if path.exists() and any(other.name != _LOCK for other in path.iterdir()):
                raise StoreError(f"{path} holds other files and no manifest.json; choose an empty directory.")
            path.mkdir(parents=True, exist_ok=True)
            with _locked(path, fcntl.LOCK_EX):
                if not file.exists():  # else another process was first
                    made = {"date": str(date or Date.today()), "engines": [], "id": token_hex(8)}
                    write_sealed(file, {**_manifest(process), **made})
        store = cls(path)
        store.refuse_other(process)
        store.notes += _unknown(path, store.manifest, _manifest(process))
        return store

    def refuse_other(self, process: Mapping[str, Any]) -> None:
        """Raise a StoreError if the store was made by another process (`create`); the fields that differ are named."""
        if differing := list(_differing(self.manifest, _manifest(process))):
            raise StoreError(
                f"{self.path} was generated by another process: " + "; ".join(differing[:8]) + ". "
                "Generate into another directory, or use the settings of the manifest."
            )

    @property
    def process(self) -> dict[str, Any]:
        """What decides the distribution of its rows, as of `create`."""
        return {**self.manifest["process"], "identities": self.manifest.get("identities", {})}

    @property
    def date(self) -> Date | None:
        """The date that its prompts have, where templates print one; None in stores that do not say yet."""
        try:
            return Date.fromisoformat(self.manifest["date"]) if "date" in self.manifest else None
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path / 'manifest.json'}: `date` is no date ({error}).") from error

    @property
    def splitting(self) -> Splitting:
        """How its solutions are cut into steps; raises ConfigError if this version does not know that."""
        return splitting_of(self.manifest["process"].get("splitting"))

    def note(self, **facts: Any) -> None:
        """Write facts into the manifest, beside the process; its write lock must be held."""
        self.manifest.update(facts)
        self._save()

    def _save(self) -> None:
        write_sealed(self.path / "manifest.json", self.manifest)

    @property
    def live(self) -> set[TreeKey]:
        """Trees that live episodes grow, as far as they go, and `generate` has not closed; as it is on disk now."""
        file = self.path / _LIVE
        with refusing_damage(file, StoreError, "list of open trees", _RESTORE):
            listed = read_sealed(file) if file.exists() else {}
            return {(problem, int(replica)) for replica, problems in listed.items() for problem in problems}

    def note_live(self, trees: Collection[TreeKey], closed: Collection[TreeKey] = ()) -> None:
        """Note trees that live episodes grow, and those that are closed by now; its write lock must be held."""
        before = self.live
        if (now := before.union(trees).difference(closed)) != before:
            listed: dict[str, list[str]] = {}
            for problem, replica in sorted(now):
                listed.setdefault(str(replica), []).append(problem)
            write_sealed(self.path / _LIVE, listed)

    def identify(self, role: str, model: Mapping[str, Any]) -> None:
        """Note what tells a role's model from others, as far as the store does not know it.

        Raises:
            StoreError: It is another model than the one that the store was made with.
        """
        if differing := list(_others({role: model}, self.manifest.get("identities", {}))):
            raise StoreError(f"{self.path} was generated by another process: {'; '.join(differing)}. "
                             "Generate into another directory, or use the model of the manifest.")  # fmt: skip
        if _learn(self.manifest, {role: model}):
            self._save()

    def record_engine(self, start: Mapping[str, Any]) -> None:
        """Add one engine start: role, engine, versions, seed, and its number if that is not the next."""
        self.manifest["engines"].append({"start": self.next_start(), **start})
        self._save()

    def next_start(self) -> int:
        """Return the number of the next engine start, for its seed; no start has it yet."""
        numbers = (each.get("start", place) for place, each in enumerate(self.manifest["engines"]))
        return max(numbers, default=-1) + 1

    def problems(self, split: str | None = None) -> list[Problem]:
        """Return the store's problems, of one split or all.

        Raises:
            StoreError: No problems, or none in this split.
        """
        file = self.path / "problems.parquet"
        if not file.is_file():
            return []
        with refusing_damage(file, StoreError, "list of problems", _RESTORE), open_parquet(file) as opened:
            problems = [Problem(*row) for row in values_of(opened.read(), _PROBLEMS.names)]
        if split is None:
            return problems
        chosen = [problem for problem in problems if problem.split == split]
        if not chosen:
            raise StoreError(f"{self.path}: no problem in split {split!r}."
                             + did_you_mean(split, {problem.split for problem in problems}))  # fmt: skip
        return chosen

    def holding(self, split: str | None) -> Store:
        """Return the store that holds a split: this one, or one in its folder of that name (design.md, section 3).

        Raises:
            StoreError: The one in the folder was made by another process; the fields that differ are named.
        """
        inner = self.path / (split or "")
        if (
            split is None
            or not (inner / "manifest.json").is_file()
            or split in {each.split for each in self.problems()}
        ):
            return self
        found = Store(inner)
        self.refuse_unlike(found, but={"seed": None})
        return found

    def refuse_unlike(self, other: Store, but: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Raise a StoreError if another store was made by another process; the fields that differ are named.

        Args:
            other: The other store.
            but: What stands for what both have in these fields.
        """
        one, two = ({**each.manifest, "process": {**each.manifest["process"], **but}} for each in (self, other))
        if differing := list(_differing(one, two)):
            differences = "; ".join(differing[:8])
            raise StoreError(f"{other.path} was generated by another process than {self.path}: {differences}.")

    def tidy(self) -> None:
        """Merge new shards of every table that has many (`MANY`), as commands do that have added rows."""
        for table in self.tables():
            table.compact(MANY)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        """Add problems that are not there yet.

        Raises:
            StoreError: A problem with the same id but other content is there.
        """
        known = {problem.id: problem for problem in self.problems()}
        for problem in problems:
            if problem.id in known and known[problem.id] != problem:
                raise StoreError(
                    f"{self.path}: problem {problem.id!r} is there with other content: "
                    f"{known[problem.id]!r} against {problem!r}. Give the new file another source name."
                )
        new = [problem for problem in problems if problem.id not in known]
        if not new:
            return
        rows = (*known.values(), *dict.fromkeys(new))
        table = pa.table({name: [getattr(row, name) for row in rows] for name in _PROBLEMS.names}, _PROBLEMS)
        write_parquet(self.path / "problems.parquet", _PROBLEMS, [table])

    def scores(self, name: str) -> Table:
        """Return the score table of a scorer (perhaps still empty)."""
        columns, roles = self._shape(name)
        return self._table(self.path / "scores" / name, scores_of(columns), columns, roles)

    def score_rows(self, name: str, steps: Rows | None = None, **limits: Any) -> Rows:
        """Return the rows of a score table, empty if it is not there yet; with statistics that came with the steps.

        Args:
            name: Name of the table.
            steps: Where the latter are looked up; default: in the steps on the disk.
            limits: As of `Rows`.
        """
        table, steps = self.scores(name), steps or self.step_statistics()
        return Rows(table, beside=steps if name in ROLES and table.values == STATISTICS else None, **limits)

    def step_statistics(self) -> Rows | None:
        """Return the statistics that came with the steps, under their authors; None if none did."""
        return Rows(self.steps, *STATISTICS) if self.steps.has_values(STATISTICS[0]) else None

    def _shape(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the columns of a score table, and whose steps have rows."""
        if not (self.path / "scores" / name / "manifest.json").is_file():
            return (STATISTICS, LOOKED_AT[name]) if name in ROLES else (_USUAL["columns"], ROLES)
        told = {**_USUAL, **self.table_manifest("scores", name)}
        return tuple(told["columns"]), tuple(told["roles"])

    def signals(self) -> list[str]:
        """Return the names of the score tables, and of the models whose steps came with statistics of their tokens."""
        return sorted({*self.names("scores"), *(ROLES if self.step_statistics() else ())})

    def grades(self, name: str) -> Table:
        """Return the grade table of a grader (perhaps still empty)."""
        return self._table(self.path / "grades" / name, GRADES)

    def _table(
        self, directory: Path, schema: pa.Schema, columns: Sequence[str] = (), roles: Sequence[str] = ROLES
    ) -> Table:
        shape = directory, tuple(columns), tuple(roles)
        table = self._tables.setdefault(shape, Table(directory, schema, columns, roles))
        table.by_place = self._by_place()
        return table

    def _by_place(self) -> bool:
        """Whether every step is still the one that rows without a content were made for."""
        return not any((self.path / _SET_ASIDE / "steps").glob("*"))

    def attach(
        self,
        kind: str,
        name: str,
        process: Mapping[str, Any],
        columns: Sequence[str] = ("score",),
        roles: Sequence[str] = ROLES,
    ) -> Table:
        """Return a score or grade table to append to, writing its manifest or comparing with it.

        Args:
            kind: ``scores`` or ``grades``.
            name: Name of the table.
            process: What decides its values; ``identities`` as in `create`.
            columns: Those of a score table.
            roles: Whose steps it is about.

        Raises:
            StoreError: The table was made by another process; the fields that differ are named.
        """
        shape = {
            name: list(own) for name, own in (("columns", columns), ("roles", roles)) if tuple(own) != _USUAL[name]
        }
        directory = self.path / kind / name
        file = directory / "manifest.json"
        if file.exists():
            found, wanted = self.table_manifest(kind, name), {**_manifest(process), **shape}
            self._refuse(kind, name, _differing(_with_shape(found), _with_shape(wanted)))
            self.notes += _unknown(directory, found, wanted)
            if _learn(found, wanted.get("identities", {})):
                write_sealed(file, found)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            write_sealed(file, {**_manifest(process), **shape})
        return self.scores(name) if kind == "scores" else self.grades(name)

    def refuse_others(self, kind: str, name: str, models: Mapping[str, Any]) -> None:
        """Raise a StoreError if a score or grade table was made by other models of the same names."""
        if (self.path / kind / name / "manifest.json").exists():
            self._refuse(kind, name, _others(models, self.table_manifest(kind, name).get("identities", {})))

    def _refuse(self, kind: str, name: str, differences: Iterator[str]) -> None:
        if differing := list(differences):
            directory = self.path / kind / name
            remedy = "Give the new table another `name` under [scorer], or remove" if kind == "scores" else "Remove"
            raise StoreError(f"{directory} was made by another process: {'; '.join(differing[:8])}. {remedy} the "
                             f"folder {directory}: the same command then makes it anew.")  # fmt: skip

    def table_manifest(self, kind: str, name: str) -> dict[str, Any]:
        """Return the manifest of a score or grade table."""
        return _read_manifest(self.path / kind / name / "manifest.json")

    def names(self, kind: str) -> list[str]:
        """Return the names of the score or grade tables that are there."""
        directory = self.path / kind
        return sorted(path.name for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []

    def choose(self, kind: str, name: str | None) -> str:
        """Return `name`, or the only table of that kind.

        Of scores the one with a column ``score`` is meant, or where there is none ``small``. A name may also be that of
        a column, ``TABLE.COLUMN`` (`scored_by`).

        Raises:
            StoreError: There is none, there are several and no name was given, or the name is unknown.
        """
        names = known = self.names(kind)
        command = "score" if kind == "scores" else "grade"
        if kind == "scores":
            known = self.signals()
            if name is not None and (name in known or name.rpartition(".")[0] in known):
                return name
            names = [each for each in known if "score" in self._shape(each)[0]] or [n for n in known if n == SMALL]
        if not names:
            place = shlex.quote(str(self.path))
            raise StoreError(f"{self.path}: no {kind} yet. Add them with `python -m rollouts {command} {place}`.")
        if name is None and len(names) == 1:
            return names[0]
        if name is None:
            option = "--scorer" if kind == "scores" else "--grader"
            raise StoreError(f"{self.path} has several {kind} tables, name one with {option}: {', '.join(names)}.")
        if name not in names:
            raise StoreError(f"{self.path}: no {kind} table {name!r}.{did_you_mean(name, known)}")
        return name

    def scored_by(self, name: str) -> tuple[str, str]:
        """Return table and column of a scorer's name (`choose`): ``small`` stands for ``small.min_logprob``.

        Raises:
            StoreError: It has no such column, or one that cannot be a score (`rollouts.text.likelihood.as_score`).
        """
        table, column = (name, "") if name in self.signals() else name.rpartition(".")[::2]
        columns = self._shape(table)[0]
        column = column or first_of(columns)
        if column not in columns or as_score(column, 0.0) is None:
            able = [each for each in columns if as_score(each, 0.0) is not None]
            raise StoreError(f"{self.path}: {name!r} is no column that can be a score.{did_you_mean(column, able)}")
        return table, column

    def tables(self) -> list[Table]:
        """Return all tables of rows: steps, then every score and grade table."""
        scores = [self.scores(name) for name in self.names("scores")]
        return [self.steps, *scores, *(self.grades(name) for name in self.names("grades"))]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store's write lock; the manifest is read again, as another process may have added to it.

        Raises:
            StoreError: Another process is writing.
        """
        with _locked(self.path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            self.manifest = _read_manifest(self.path / "manifest.json")
            yield

    def repair(self, *, drop_failed: bool = False) -> list[str]:
        """Set unreadable shards aside (``set-aside/``), remove leftovers of crashes; return what was done.

        Args:
            drop_failed: Also drop the steps whose requests failed, so that they are asked for again.
        """
        done: list[str] = []
        for table in reversed(self.tables()):  # steps last
            for path in table.leftovers():
                path.unlink()
                done.append(f"removed the unfinished {path}")
            broken: dict[Path, StoreError] = {}
            for path in table.shards():
                try:
                    for _ in table.parts(path):
                        pass
                except StoreError as error:
                    broken[path] = error
            if table is self.steps and broken and self._by_place():
                self._complete([path for path in table.shards() if path not in broken])
            for path, why in broken.items():
                target = self.path / _SET_ASIDE / path.relative_to(self.path)
                number = 0
                while target.exists():  # a shard of that name was set aside before
                    number += 1
                    target = target.with_name(f"{path.stem}.{number}{path.suffix}")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
                done.append(f"moved {path} to {target}: {why}")
        if drop_failed:
            if self._by_place():
                self._complete(self.steps.shards())
            if dropped := self.steps.drop("stop_reason", StopReason.FAILED):
                done.append(f"dropped {dropped} failed steps; `generate` asks for them again")
        return done

    def _complete(self, readable: Sequence[Path]) -> None:
        """Before steps go: note in old scores and grades which texts, of those in these shards, they are about."""
        contents: dict[RowKey, int] = {}
        for part in chain.from_iterable(self.steps.parts(path, [*KEY, "text"]) for path in readable):
            contents_of(part, contents)
        for table in self.tables()[1:]:
            table.complete(contents)


def score_command(store: str | Path, table: str) -> str:
    """Return the command that fills a score table."""
    return f"python -m rollouts score {shlex.quote(str(store))}" + (f" --scorer {table}" if table in ROLES else "")


@contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    with (directory / _LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, how)
        except OSError as error:
            raise StoreError(f"{directory}: another process is writing to this store.") from error
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def _read_manifest(file: Path) -> dict[str, Any]:
    with refusing_damage(file, StoreError, "manifest", _RESTORE):
        manifest = read_sealed(file)
        return {**manifest, "schema_version": manifest["schema_version"], "process": dict(manifest["process"])}


def _manifest(process: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a process, with what tells its models from others beside it."""
    rest = dict(process)
    models = {role: dict(model) for role, model in rest.pop("identities", {}).items() if model}
    plain = rest.get("splitting", BLANK_LINE.described()) == BLANK_LINE.described()
    version = 1 if plain else SCHEMA_VERSION
    return {"schema_version": version, "process": rest, **({"identities": models} if models else {})}


def _with_shape(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a table whose process tells columns and roles, too."""
    shape = {name: list(manifest.get(name, usual)) for name, usual in _USUAL.items()}
    return {**manifest, "process": {**manifest["process"], **shape}}


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each thing in which two manifests differ."""
    usual = {"splitting": BLANK_LINE.described()}  # where a manifest does not name one
    yield from _differences(usual | found["process"], usual | wanted["process"])
    yield from _others(wanted.get("identities", {}), found.get("identities", {}))


def _others(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each part in which a role's model is another."""
    for role, parts in here.items():
        known = there.get(role, {})
        for part in sorted(known.keys() & parts.keys()):
            if known[part] != parts[part]:
                verb = "differ" if part == "weights" else "differs"
                yield f"{role} model: {part} {verb} ({known[part]} there, {parts[part]} here)"


def _unknown(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield the roles of which a manifest does not say which model it was."""
    known = found.get("identities", {})
    for role, parts in wanted.get("identities", {}).items():
        if known.get(role, {}).keys().isdisjoint(parts):
            yield f"{place} does not say which {role} model made it; whether it was the one of now cannot be told."


def _learn(manifest: dict[str, Any], models: Mapping[str, Mapping[str, Any]]) -> bool:
    """Add what is new of models to a manifest; return whether anything was."""
    before = manifest.get("identities", {})
    known = before | {role: {**parts, **before.get(role, {})} for role, parts in models.items() if parts}
    manifest.update({"identities": known} if known else {})
    return bool(known != before)


def _differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """Yield one line per leaf in which two nested mappings differ."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{place}.{key}".lstrip("."))
    elif _jsonable(found) != _jsonable(wanted):
        yield f"{place} is {found!r} there and {wanted!r} here"


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))
