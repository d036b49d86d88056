"""Opening what a configuration names: step writers and scorers over their backends, and the manifest they imply."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import date as Date
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rollouts.config import FamilyConfig, GeneratorConfig, ModelConfig
from rollouts.errors import ConfigError, StoreError
from rollouts.models.base import Backend
from rollouts.models.hf.load import native_window
from rollouts.models.identity import identity, served
from rollouts.models.open import open_backend
from rollouts.models.server.chat import ChatWriter, step_request
from rollouts.models.stepwise import StepModel, StepRules
from rollouts.plugins import build_plugin, is_plugin
from rollouts.scoring.base import EXAMPLES, Example, Scorer, self_test
from rollouts.scoring.judge import JudgeScorer
from rollouts.scoring.likelihood import LikelihoodScorer
from rollouts.scoring.prm import RewardScorer, rounding
from rollouts.scoring.self_evaluation import SelfEvaluationScorer
from rollouts.scoring.verification import Verifier
from rollouts.tasks.problems import Problem
from rollouts.text.layouts import reward_layout
from rollouts.text.likelihood import LOOKED_AT, STATISTICS, TOP
from rollouts.text.prompts import PromptFormat, Reading, RewardLayout, has_room, hash_of
from rollouts.text.splitting import Marks, Splitting
from rollouts.text.steps import DELIMITER, ROLES, SMALL
from rollouts.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rollouts.store.store import Store

_ROOM_BEYOND_SOLUTION = 2048
_OLDEST = 3000  # days: no store that does not tell its date is older
_NAMED = 5  # problems whose questions hold special tokens
_ASKED_BY_CHAT = hash_of(step_request("question", ["One." + DELIMITER]))
"""Hash of how a model that can only be asked by chat is asked."""


class Family:
    """A small model, a large model and a scorer, as configured; models are loaded only while they are used.

    Attributes:
        date: What chat templates take for today, in every prompt of this family.
    """

    def __init__(
        self,
        config: FamilyConfig,
        *,
        seed: int = 0,
        examples: Sequence[Example] = EXAMPLES,
        store: Store | None = None,
    ) -> None:
        """Check what can be checked without loading a model.

        Args:
            config: The roles.
            seed: Run seed.
            examples: Known paths for the scorer's self-test.
            store: The store that is continued or scored, whose date prompts keep.

        Raises:
            ConfigError: No tokenizer, a chat template that cannot be used, an unknown window, or another date than the
                store's.
        """
        self.config = config
        self.seed = seed
        self.examples = examples
        self.limits = config.limits
        self.splitting = Splitting(config.steps)
        made = None if store is None else store.date
        if store is not None and made and config.date not in (None, made):
            raise ConfigError(
                f"date is {config.date} in the models file, but the prompts of {store.path} have {made}. Leave it out."
            )
        self.date = config.date or made or Date.today()
        self.prompts = cache(self._prompts)
        self.identity = cache(identity)
        self._continuing = [role for role in ROLES if not config.generator(role).chat_only]
        for role in self._continuing:
            self.prompts(role)
        if store is not None and not made and not config.date:
            self._find_date(store.manifest["process"])

    def _find_date(self, process: Mapping[str, Any]) -> None:
        """Find out which date the prompts of a store have that does not tell, by their hashes."""
        for role in self._continuing:
            prompts, wanted = self.prompts(role), process.get(role, {}).get("template_hash")
            if prompts.dated and prompts.template_hash != wanted:
                days = (self.date - timedelta(days) for days in range(_OLDEST))
                self.date = next((day for day in days if prompts.hash_on(day) == wanted), self.date)
                self.prompts = cache(self._prompts)

    def _prompts(self, role: str) -> PromptFormat:
        """Return the prompt format of a generating role."""
        model = self.config.generator(role)
        tokenizer = load_tokenizer(*model.tokenizer_source)
        return PromptFormat(tokenizer, model.system_prompt, name=role, date=self.date, marks=self.marks(role))

    def marks(self, role: str) -> Marks | None:
        """Return what opens and closes the thinking block of a generating role; None where models do not think."""
        return self.config.generator(role).think if self.splitting.thinks else None

    @cached_property
    def reward_prompts(self) -> RewardLayout | None:
        """The input format of the reward model, if there is one."""
        scorer, model = self.config.scorer, self._reward_model
        if scorer is None or model is None:
            return None
        return reward_layout(scorer, load_tokenizer(*model.tokenizer_source), date=self.date, splitting=self.splitting)

    @property
    def _reward_model(self) -> ModelConfig | None:
        """The process reward model, if there is one: a judge reads what a chat of its server makes of texts."""
        scorer = self.config.scorer
        return scorer.model if scorer is not None and scorer.kind == "prm" else None

    def _window(self, role: str, model: ModelConfig) -> int:
        if model.max_length is not None:
            return model.max_length
        own = () if model.backend == "server" else ((model.model, model.revision),)
        places = dict.fromkeys([*own, model.tokenizer_source])  # its folder may be on the machines of workers alone
        native = next(filter(None, (native_window(*place) for place in places)), None)
        if native is None:
            raise ConfigError(f"{role}: its window is unknown; set max_length in its section.")
        return min(native, self.limits.solution_tokens + _ROOM_BEYOND_SOLUTION)

    @cached_property
    def windows(self) -> dict[str, int]:
        """The tokens of prompt and completion that each role may use together.

        The model's own window, cut to what the solution limit and a long problem need: engines reserve memory
        for it. One that is unknown is a ConfigError.
        """
        models: dict[str, ModelConfig] = {role: self.config.generator(role) for role in self._continuing}
        if self._reward_model is not None:
            models["scorer"] = self._reward_model
        return {role: self._window(role, model) for role, model in models.items()}

    def fits(self, question: str, steps: Sequence[str]) -> bool:
        """Whether a prefix leaves room for one more token in every role's window (docs/design.md, section 1)."""
        formats = self.formats
        return all(has_room(prompts, self.windows[role], question, steps) for role, prompts in formats.items())

    @property
    def formats(self) -> dict[str, PromptFormat | RewardLayout]:
        """What renders prompts, by role: of models that are asked by chat there is none."""
        formats: dict[str, PromptFormat | RewardLayout] = {role: self.prompts(role) for role in self._continuing}
        return formats if self.reward_prompts is None else {**formats, "scorer": self.reward_prompts}

    def neutralised(self, problems: Sequence[Problem]) -> dict[str, dict[str, Any]]:
        """Return, by role, the special tokens of questions, which are read as text.

        Returns:
            ``tokens`` and ``questions`` are counts, ``first`` names some problems; without a role that finds none.
        """
        found = {}
        for role, prompts in self.formats.items():
            counts = {item.id: tokens for item in problems if (tokens := prompts.special.count(item.question))}
            if counts:
                first = list(counts)[:_NAMED]
                found[role] = {"tokens": sum(counts.values()), "questions": len(counts), "first": first}
        return found

    def process(self, max_escalations: int | None, *, labels: bool = False) -> dict[str, Any]:
        """Return what decides the distribution of generated steps: the manifest's ``process``."""
        described: dict[str, Any] = {
            "mode": "chat" if self.config.large.chat_only else "continue",
            "delimiter": DELIMITER,
            "splitting": self.splitting.described(),
            "limits": asdict(self.limits),
            "max_escalations": max_escalations,
            "seed": self.seed,
            "labels": labels,
            "windows": dict(self.windows),
            "identities": {role: self.identity(self.config.generator(role)) for role in ROLES},
        }
        for role in ROLES:
            model = self.config.generator(role)
            described[role] = {
                "model": model.display_name,
                "revision": model.revision,
                "licence": model.licence,
                "system_prompt": model.system_prompt,
                "template_hash": self.prompts(role).template_hash if role in self._continuing else _ASKED_BY_CHAT,
                "sampling": asdict(model.sampling),
            }
        return described

    @contextmanager
    def open(self, role: str, store: Store) -> Iterator[Any]:
        """Load the model of ``small`` or ``large`` as a step writer, and record the start in the store."""
        model: GeneratorConfig = self.config.generator(role)
        if model.chat_only:
            with closing(ChatWriter(role, model, self.limits, self.fits)) as chat:
                store.identify(role, served(chat.describe()))
                self._record(store, {"role": role, **chat.describe()})
                yield chat
            return
        store.identify(role, self.identity(model))  # before it is loaded
        with self._backend(role, model, store, writes=True) as backend:
            window, sampling = backend.window, model.sampling
            rules = StepRules(role, self.prompts(role), window, sampling, self.limits, self.fits, self.seed)
            if model.logprobs and not backend.capabilities.logprobs:
                raise ConfigError(
                    f"{role}: its server tells no log-probabilities of what it decodes, which `logprobs` asks for. "
                    f"Leave that out, or have the server tell them (vLLM: --max-logprobs {TOP})."
                )
            if rules.prompts.hidden and not backend.capabilities.token_ids:
                raise ConfigError(
                    f"{role}: {model.think[1]!r}, which closes its thinking block, has special tokens, which its "
                    "server leaves out of texts; it would have to tell token ids, as vLLM's does."
                )
            yield StepModel(backend, replace(rules, likelihood=model.logprobs, splitting=self.splitting))

    @contextmanager
    def _backend(
        self, role: str, model: ModelConfig, store: Store, reading: Reading | None = None, *, writes: bool = False
    ) -> Iterator[Backend]:
        digest = hashlib.blake2b(f"{self.seed}|{role}|{store.next_start()}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little") >> 1  # no two starts of a store share one
        sized, known = model.model_copy(update={"max_length": self.windows[role]}), self.identity(model)
        with open_backend(role, sized, seed=seed, reading=reading) as backend:
            if backend.window < self.windows[role]:
                raise ConfigError(
                    f"{role}: its window is {backend.window} tokens, the configuration says {self.windows[role]}."
                )
            backend.identity = {**known, **served(backend.describe())}
            if writes:
                store.identify(role, backend.identity)
            self._record(store, {"role": role, "seed": seed, **backend.describe()})
            yield backend

    def _record(self, store: Store, start: Mapping[str, Any]) -> None:
        store.manifest.setdefault("date", str(self.date))  # a store of an earlier version did not tell
        store.record_engine(start)

    @property
    def scorer_name(self) -> str:
        """Name of the configured scorer's table.

        Raises:
            ConfigError: No scorer is configured.
        """
        scorer = self.config.scorer
        if scorer is None:
            raise ConfigError("No [scorer] section in the models file.")
        if is_plugin(scorer.kind):
            return table_name(scorer.name or scorer.kind)
        model = scorer.model if scorer.model is not None else self.config.generator(scorer.under)
        return table_name(scorer.name or f"{scorer.kind}-{model.display_name}")

    def refuse_other_scores(self, store: Store) -> None:
        """Raise a StoreError if a store has scores by another model of the scorer's name; nothing is loaded."""
        scorer = self.config.scorer
        if scorer is not None and not is_plugin(scorer.kind):
            role, model = (
                ("scorer", scorer.model) if scorer.model else (scorer.under, self.config.generator(scorer.under))
            )
            store.refuse_others("scores", self.scorer_name, {role: self.identity(model)})

    def scoring(
        self, who: str, store: Store, writers: Mapping[str, Any] = MappingProxyType({})
    ) -> AbstractContextManager[Scorer]:
        """Open the scorer, or what looks at steps with the model of a role, which may be loaded as a writer."""
        if who in writers:
            return nullcontext(self.statistics(who, getattr(writers[who], "backend", None)))
        return self.open_statistics(who, store) if who in ROLES else self.open_scorer(store)

    @contextmanager
    def open_statistics(self, role: str, store: Store) -> Iterator[LikelihoodScorer]:
        """Load a generating model to look at steps: its own, of the large model also what the small one wrote.

        Raises:
            ConfigError: It can only be asked by chat, its backend gives no log-probabilities of prompts, or solutions
                think in the store and not here, or the other way round.
        """
        refuse_other_thinking(store, self.splitting)
        if self.config.generator(role).chat_only:
            self.statistics(role, None)
        self._refuse_another(role, store)
        with self._backend(role, self.config.generator(role), store) as backend:
            yield self.statistics(role, backend)

    def _refuse_another(self, role: str, store: Store) -> None:
        """Raise a StoreError unless a role's model, and its prompts, are those that the store was made with."""
        model, made = self.config.generator(role), store.manifest["process"][role]
        here = {"model": model.display_name, "template_hash": self.prompts(role).template_hash}
        if differing := [name for name, value in here.items() if made.get(name, value) != value]:
            told = ", ".join(f"{name} is {made[name]} there, {here[name]} here" for name in differing)
            raise StoreError(f"{store.path} was made by another {role} model or other prompts: {told}. Name the models "
                             "file that it was made with (--models).")  # fmt: skip
        store.identify(role, self.identity(model))

    def statistics(self, role: str, backend: Backend | None) -> LikelihoodScorer:
        """Return what looks at steps with a generating model that is loaded.

        Raises:
            ConfigError: It can only be asked by chat (None), or its backend gives no log-probabilities of prompts.
        """
        if backend is None:
            raise ConfigError(
                f"{role}: a model that can only be asked by chat gives no log-probabilities of prompts, so that there "
                f"are no columns {role}.*; those of the other model and a [scorer] do not need it."
            )
        name = self.config.generator(role).display_name
        return LikelihoodScorer(role, backend, self.prompts(role), name, STATISTICS, LOOKED_AT[role])

    @contextmanager
    def open_verifier(self, store: Store) -> Iterator[Verifier]:
        """Load the small model to verify what it wrote by itself; raises `ConfigError` as of `open_statistics`."""
        refuse_other_thinking(store, self.splitting)
        if self.config.small.chat_only:
            raise ConfigError("small: verification continues prompts, which a model with chat_only does not.")
        self._refuse_another(SMALL, store)
        with self._backend(SMALL, self.config.small, store) as backend:
            yield Verifier(backend, self.prompts(SMALL).tokenizer, self.config.small.display_name, self.date)

    @contextmanager
    def open_scorer(self, store: Store) -> Iterator[Scorer]:
        """Load the scorer, test it on known paths and record its start in the store.

        Raises:
            ConfigError: No scorer is configured, it fails its self-test, or solutions think in the store and not here,
                or the other way round.
        """
        refuse_other_thinking(store, self.splitting)
        name, scorer = self.scorer_name, self.config.scorer
        assert scorer is not None
        with ExitStack() as stack:
            built: Scorer
            if is_plugin(scorer.kind):
                built = build_plugin(scorer.kind, "[scorer] kind", Scorer, name, **scorer.options)
                stack.callback(getattr(built, "close", lambda: None))
                if built.name != name:
                    raise ConfigError(f"[scorer] kind {scorer.kind!r}: `name` is {built.name!r}, expected {name!r}.")
            elif scorer.kind == "judge":
                assert scorer.model is not None
                judge = JudgeScorer(name, scorer, self.identity(scorer.model), self.splitting)
                built = stack.enter_context(closing(judge))
                self._record(store, {"role": "scorer", **judge.describe()})
            elif scorer.model is not None:
                prompts = self.reward_prompts
                assert prompts is not None
                backend = stack.enter_context(self._backend("scorer", scorer.model, store, prompts.reading))
                tolerance = rounding(backend.describe())
                built = RewardScorer(name, backend, prompts, scorer.model.display_name, tolerance)
            else:
                under, model = self.prompts(scorer.under), self.config.generator(scorer.under)
                backend = stack.enter_context(self._backend(scorer.under, model, store))
                if scorer.kind == "likelihood":
                    built = LikelihoodScorer(name, backend, under, model.display_name)
                else:
                    built = SelfEvaluationScorer(name, backend, under.tokenizer, model.display_name, self.date)
            if scorer.model is not None or is_plugin(scorer.kind):
                self_test(built, self.examples, informed=scorer.model is not None and scorer.informed)
            yield built


def refuse_other_thinking(store: Store, splitting: Splitting) -> None:
    """Raise a ConfigError unless solutions think in a store if they do here: else their steps would be read wrongly."""
    if store.splitting.thinks != splitting.thinks:
        does, here = ("think", "do not") if store.splitting.thinks else ("do not think", "do")
        raise ConfigError(
            f"The solutions of {store.path} {does}, those of the models file {here}: set split = "
            f"{store.splitting.steps.split!r} under [steps] there."
        )


def table_name(name: str) -> str:
    """Return the name of a scorer's table."""
    return "".join(character if character.isalnum() or character in "-._" else "-" for character in Path(name).name)
