"""What users set: the file that names the models, a TOML section per role, and how a command's settings are checked."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from datetime import date as Date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import tyro
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from rollouts.errors import ConfigError, did_you_mean
from rollouts.plugins import is_plugin

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SystemPrompt = Annotated[str | None, AfterValidator(lambda text: text or None)]
"""A system message; the empty one, as TOML knows no null, is that none is sent."""
BackendKind = Literal["vllm", "server", "transformers"]
_CUTS = ("min_tokens", "cues", "sentences")
SPLITTINGS: dict[str, tuple[str, ...]] = {
    "blank-line": (),
    "thinking": (*_CUTS, "max_thinking_tokens", "answer_by"),
    "sentence": _CUTS,
}
"""What solutions can be cut by, and the settings that each knows."""
_SCORERS: dict[str, tuple[str, ...]] = {
    "prm": ("layout", "system_prompt", "step_tag", "informed"),
    "judge": ("prompt", "max_tokens", "system_prompt", "informed"),
    "likelihood": ("under",),
    "self-evaluation": ("under",),
}
"""Scorers of ours, and the settings that each knows besides its name and model."""
LAYOUTS = ("qwen2.5-math-prm", "skywork-o1", "math-shepherd", "rlhflow")
"""Kinds of reward models, by how they are read (`rollouts.text.layouts`)."""
_TAGGED = ("qwen2.5-math-prm", "math-shepherd")
_SPOKEN_TO = ("qwen2.5-math-prm", "rlhflow")


def _urls(given: Any) -> Any:
    if isinstance(given, str):
        return [url.strip() for url in given.split(",")]
    if isinstance(given, list | tuple) and all(isinstance(each, str) for each in given):
        return [url for each in given for url in _urls(each)]
    return given


Urls = Annotated[tuple[str, ...], BeforeValidator(_urls)]
"""URLs of one server or of several: a text, with commas between them, or a list."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def set_beyond(self, *known: str) -> list[str]:
        """Return the settings besides some that are given, and not as they are by default."""
        fields = {name: field for name, field in type(self).model_fields.items() if name not in known}
        return [name for name, field in fields.items() if getattr(self, name) not in (field.default, None)]


_AnySection = TypeVar("_AnySection", bound=_Section)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Sampling:
    """Sampling parameters of one role; all of them are sent with every request.

    Presence and frequency penalties do not exist here: they depend on what was decoded in the same request,
    so stepwise and whole-path generation would be two different processes.
    """

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Limits:
    """Token and step limits of a solution (docs/design.md, section 1); part of every manifest.

    Attributes:
        step_tokens: Most tokens of one step.
        solution_tokens: Most tokens of accepted text in one solution.
        max_steps: Most accepted steps of one solution.
    """

    step_tokens: Count = 512
    solution_tokens: Count = 2048
    max_steps: Count = 30


class StepsConfig(_Section):
    """How solutions are cut into steps (`rollouts.text.splitting`); part of every manifest.

    Attributes:
        split: ``blank-line``; ``thinking``, with which both models think before they answer, in a block that is a
            sequence of steps of its own; ``sentence``; or ``module:object`` (`rollouts.text.splitting.Splitter`).
        min_tokens: Fewest tokens of a step of the block, or with ``sentence`` of any: shorter ones go together.
        cues: Words with which a step of these begins wherever a sentence or line begins with them, such as "Wait".
        sentences: Sentences of a step of these; a blank line ends one, too. 0: only blank lines do; ``sentence``: 1.
        max_thinking_tokens: Tokens after which the thinking block is closed by force, within ``solution_tokens``.
        answer_by: Who writes the answer after the block: ``router`` goes on as within it, step by step; ``small`` and
            ``large`` leave nothing to decide.
        options: Table handed to a splitter of one's own.
    """

    split: str = "blank-line"
    min_tokens: Count = 1
    cues: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    sentences: Annotated[int, Field(ge=0)] = 0
    max_thinking_tokens: Count = 1024
    answer_by: Literal["small", "large", "router"] = "router"
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_sentence(cls, values: Any) -> Any:
        one = isinstance(values, dict) and values.get("split") == "sentence"
        return {"sentences": 1, **values} if one else values

    @model_validator(mode="after")
    def _consistent(self) -> StepsConfig:
        if self.split not in SPLITTINGS and not is_plugin(self.split):
            raise ValueError(f"split should be {', '.join(map(repr, SPLITTINGS))} or 'module:object'")
        known = SPLITTINGS.get(self.split, ("options",))
        if others := self.set_beyond("split", *known):
            raise ValueError(f"{', '.join(others)}: split {self.split!r} knows {', '.join(known) or 'no settings'}")
        if self.split == "sentence" and not self.sentences:
            raise ValueError("split 'sentence' needs at least one of `sentences`")
        return self


class ModelConfig(_Section):
    """One model and where it runs.

    Attributes:
        backend: ``vllm`` or ``transformers`` (in a process of its own) or ``server`` (OpenAI-compatible HTTP).
        model: Folder or hub name; for a server, the name it serves the model under.
        name: Name in manifests; default: the folder's own name, or `model`.
        revision: Revision on the hub, if one is wanted.
        licence: Recorded in the manifest.
        tokenizer: Folder or hub name of the tokenizer; default `model`. A server needs a local one.
        devices: GPU indices; empty for CPU.
        tensor_parallel: GPUs that share the model's layers.
        memory_share: Share of each GPU's memory that vLLM may take; GiB of key-value cache on a CPU is
            `cpu_cache_gib`.
        cpu_cache_gib: Key-value cache of vLLM on a CPU, GiB.
        max_length: Window in tokens; default: what the model's configuration says.
        dtype: ``auto``, ``bfloat16``, ``float16``, ``float32`` or (transformers only) ``float64``.
        max_batch: Most sequences decoded together.
        threads: CPU threads of the engine; 0 lets it decide.
        url: Base URL of a server, such as ``http://localhost:8000/v1``, or a list of them that all serve this model.
        api_key_env: Name of the environment variable that holds the server's key.
        timeout_s: Longest time of one HTTP request, seconds; one that may decode more than 512 tokens, as whole
            solutions, has proportionally longer: 2,048 tokens four times as long.
        concurrency: Most HTTP requests under way at once at each server.
        retries: Attempts after a failed one before a server counts as gone.
        price_input: Price of a million prompt tokens, for estimates.
        price_output: Price of a million decoded tokens, for estimates.
    """

    backend: BackendKind
    model: str
    name: str | None = None
    revision: str | None = None
    licence: str = "unknown"
    tokenizer: str | None = None
    devices: tuple[int, ...] = ()
    tensor_parallel: Count = 1
    memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    cpu_cache_gib: Count = 1
    max_length: Annotated[int, Field(ge=16)] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    max_batch: Count = 256
    threads: Annotated[int, Field(ge=0)] = 0
    url: Urls = ()
    api_key_env: str | None = None
    timeout_s: Positive = 120.0
    concurrency: Count = 64
    retries: Annotated[int, Field(ge=0)] = 4
    price_input: NotNegative = 0.0
    price_output: NotNegative = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.backend == "server") != bool(self.url):
            raise ValueError("`url` belongs to backend 'server', and that backend needs it")
        if len({url.rstrip("/") for url in self.url}) < len(self.url):
            raise ValueError("`url` names a server twice")
        if self.tensor_parallel > 1 and self.backend != "vllm":
            raise ValueError("`tensor_parallel` is for backend 'vllm'; transformers spreads over `devices`")
        if self.backend == "vllm" and self.devices and len(self.devices) != self.tensor_parallel:
            raise ValueError(f"`devices` names {len(self.devices)} GPU(s), and `tensor_parallel` has the layers on "
                             f"{self.tensor_parallel}: the two must agree")  # fmt: skip
        if self.dtype == "float64" and self.backend != "transformers":
            raise ValueError("dtype 'float64' is for the transformers backend")
        return self

    @property
    def display_name(self) -> str:
        """Name in manifests and tables."""
        return self.name or (Path(self.model).name if Path(self.model).is_dir() else self.model)

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Folder or hub name of its tokenizer, and the revision there; another repository has revisions of its own."""
        own = self.tokenizer in (None, self.model) or self.backend == "server"
        return self.tokenizer or self.model, self.revision if own else None


class GeneratorConfig(ModelConfig):
    """A model that writes steps: small or large.

    Attributes:
        system_prompt: System message of the chat template; an empty one (``system_prompt = ""``) is not sent.
        sampling: Sampling parameters.
        logprobs: Ask for the log-probabilities of what is decoded, and keep their statistics with each step. Tiny
            models decode noticeably fewer tokens a second then; a prefill can add the same later.
        chat_only: The server cannot continue a partial answer: ask for single steps by chat (large model only).
        think: What opens and what closes the thinking block of this model, where models think (`StepsConfig`), with the
            line ends that belong to them. A template that opens the block itself is taken as it is.
    """

    system_prompt: SystemPrompt = "Please reason step by step, and put your final answer within \\boxed{}."
    sampling: Sampling = Sampling()
    logprobs: bool = False
    chat_only: bool = False
    think: tuple[str, Annotated[str, Field(pattern=r"\S")]] = ("<think>\n", "</think>\n\n")

    @model_validator(mode="after")
    def _chat_needs_server(self) -> GeneratorConfig:
        if self.chat_only and self.backend != "server":
            raise ValueError("`chat_only` is for backend 'server'")
        if self.chat_only and self.logprobs:
            raise ValueError("`logprobs` are not had of a model that is asked by chat (`chat_only`)")
        return self


class ScorerConfig(_Section):
    """How steps are scored.

    Attributes:
        kind: ``prm`` (a process reward model, given in `model`), ``judge`` (the chat model of a server, given in
            `model`, is asked whether the step is right), ``likelihood`` (least token probability of the step under
            `under`), ``self-evaluation`` (`under` is asked for 0-9) or ``module:object`` (a scorer of one's own,
            `rollouts.scoring.base.Scorer`).
        name: Name of the score table; default: kind and model.
        options: Table handed to a scorer of one's own.
        model: The reward model, for ``prm``, or the judge.
        layout: How the reward model is read, one of `LAYOUTS`; default: what its configuration tells.
        prompt: What a judge is asked, with ``{question}``, ``{before}`` and ``{step}``; default:
            `rollouts.scoring.judge.PROMPT`. It must ask for a yes or no, or a number in [0, 1].
        max_tokens: Most tokens of a judge's answer, hidden thoughts included.
        under: The generating role whose model scores, for ``likelihood`` and ``self-evaluation``.
        system_prompt: System message in the reward model's input; none by default for layouts other than the first, and
            for a judge.
        step_tag: Text of the token at which the reward model is read; default: its layout's own.
        informed: Whether its self-test expects right steps of known solutions to score higher than wrong ones. What
            ``train-prm`` makes has learnt how the small model ends, which need not tell them apart.
    """

    kind: str = "prm"
    name: str | None = None
    options: dict[str, Any] = {}
    model: ModelConfig | None = None
    layout: str | None = None
    prompt: str | None = None
    max_tokens: Count = 512
    under: Literal["small", "large"] = "large"
    system_prompt: SystemPrompt = "Please reason step by step, and put your final answer within \\boxed{}."
    step_tag: str | None = None
    informed: bool = True

    @model_validator(mode="before")
    @classmethod
    def _silent(cls, values: Any) -> Any:
        if isinstance(values, dict) and (
            values.get("kind") == "judge" or values.get("layout") not in (None, _SPOKEN_TO[0])
        ):
            return {"system_prompt": "", **values}
        return values

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in _SCORERS and not is_plugin(kind):
            raise ValueError(f"Input should be {', '.join(map(repr, _SCORERS))} or 'module:object'")
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> ScorerConfig:
        if (self.kind in ("prm", "judge")) != (self.model is not None):
            raise ValueError("kinds 'prm' and 'judge' need a section [scorer.model]; the other kinds take none")
        if self.options and self.kind in _SCORERS:
            raise ValueError("`options` are for a scorer of your own, kind 'module:object'")
        for name in self.set_beyond("kind", "name", "model", "options", *_SCORERS.get(self.kind, ())):
            of = " or ".join(repr(kind) for kind, settings in _SCORERS.items() if name in settings)
            raise ValueError(f"`{name}` is for kind {of}")
        if self.layout not in (None, *LAYOUTS):
            raise ValueError(f"layout should be one of the known ones.{did_you_mean(str(self.layout), LAYOUTS)}")
        for name, having in (("step_tag", _TAGGED), ("system_prompt", _SPOKEN_TO)):
            if getattr(self, name) is not None and self.layout not in (None, *having):
                raise ValueError(f"layout {self.layout!r} has no `{name}`")
        if self.kind == "judge" and self.model is not None and self.model.backend != "server":
            raise ValueError("a judge is asked through backend 'server'; its [scorer.model] has another")
        if self.prompt is not None and not all(map(self.prompt.count, ("{question}", "{step}"))):
            raise ValueError("`prompt` needs {question} and {step}")
        return self


class FamilyConfig(_Section):
    """Everything that decides what is generated: two models, a scorer, limits.

    Attributes:
        small: The small model.
        large: The large model.
        scorer: How steps are scored.
        limits: Token and step limits.
        steps: How solutions are cut into steps.
        date: What chat templates that print today's date take for today; default: the day on which a store was made,
            or a service started.
    """

    small: GeneratorConfig
    large: GeneratorConfig
    scorer: ScorerConfig | None = None
    limits: Limits = Limits()
    steps: StepsConfig = StepsConfig()
    date: Date | None = None

    @model_validator(mode="after")
    def _scorer_can_look(self) -> FamilyConfig:
        scorer = self.scorer
        if scorer and scorer.kind in ("likelihood", "self-evaluation") and self.generator(scorer.under).chat_only:
            raise ValueError(
                f"[scorer] kind {scorer.kind!r} under {scorer.under!r}, which is asked by chat alone (chat_only) and "
                "tells no log-probabilities of prompts; choose the other model (under), a prm, or no [scorer]"
            )
        return self

    @model_validator(mode="after")
    def _thinks(self) -> FamilyConfig:
        split, budget, most = self.steps.split, self.steps.max_thinking_tokens, self.limits.solution_tokens
        chats = [role for role in ("small", "large") if self.generator(role).chat_only]
        if split != "blank-line" and chats:
            raise ValueError(
                f"[{chats[0]}] `chat_only` writes steps that end at blank lines; [steps] split = {split!r} needs a "
                "server that continues a partial answer, or partial thinking"
            )
        if split == "thinking" and budget >= most:
            raise ValueError(
                f"[steps] max_thinking_tokens ({budget}) must be below [limits] solution_tokens ({most}), which the "
                "answer counts against, too"
            )
        return self

    def generator(self, role: str) -> GeneratorConfig:
        """Return the configuration of ``small`` or ``large``."""
        return self.small if role == "small" else self.large


def load_family(path: str | Path) -> FamilyConfig:
    """Read a TOML file of roles.

    Args:
        path: The file, or ``tinymath`` for the embedded family with vLLM (``tinymath:transformers`` and so on
            for another backend).

    Raises:
        ConfigError: The file is missing, is no TOML, or has an unknown key or a bad value; the message names
            file and key.
    """
    name = str(path)
    if name.split(":")[0] == "tinymath":
        return embedded_family(name.partition(":")[2] or "vllm")
    try:
        return parse_family(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the models file cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error}).") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_family(values: dict[str, Any]) -> FamilyConfig:
    """Check a nested mapping and return it as a `FamilyConfig`; raises as `checked` does."""
    return checked(FamilyConfig, values)


def checked(section: type[_AnySection], values: dict[str, Any]) -> _AnySection:
    """Check a nested mapping and return it as a section of a models file, or the whole of it.

    Raises:
        ConfigError: One line per wrong key, with its place, the value found and what was expected.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "the file"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(item["loc"][-1])
        if key in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            return f"{place}: penalties are refused, they make stepwise and whole-path generation differ"
        sections = (FamilyConfig, ModelConfig, GeneratorConfig, ScorerConfig, StepsConfig, Sampling, Limits)
        known = {name for section in sections for name in section.__annotations__}
        return f"{place}: unknown key.{did_you_mean(key, known)}"
    # URLs may hold passwords, and a whole section says nothing.
    hidden = item["type"] == "missing" or "url" in item["loc"] or isinstance(item["input"], dict)
    found = "" if hidden else f" (found {item['input']!r})"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{found}"


def embedded_family(backend: str = "vllm", dtype: str | None = None) -> FamilyConfig:
    """Return the configuration of the embedded tinymath family on one backend.

    Args:
        backend: ``vllm`` or ``transformers``.
        dtype: Number format; default float32 for vLLM and float64 for transformers, whose draws then do not
            depend on how requests were batched.
    """
    from rollouts import tinymath

    if backend not in ("vllm", "transformers"):
        raise ConfigError(
            f"tinymath runs on a backend of this process.{did_you_mean(backend, ['vllm', 'transformers'])}"
        )
    dtype = dtype or ("float64" if backend == "transformers" else "float32")
    common = {"backend": backend, "licence": "MIT", "dtype": dtype, "max_length": 1024}
    small, large, prm = (
        {**common, "model": str(tinymath.model_dir(role)), "name": f"tinymath-{role}"} for role in tinymath.ROLES
    )
    return parse_family(
        {
            "small": {**small, "system_prompt": None},
            "large": {**large, "system_prompt": None},
            "scorer": {"kind": "prm", "name": "tinymath-prm", "model": prm, "system_prompt": None},
            # No solution needs more than 12 steps. A model that lost its way rambles on, and a complete tree of
            # rambling doubles with every step.
            "limits": {"max_steps": 16},
        }
    )


Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import"), tyro.conf.UseAppendAction]
"""Modules that a user names to be imported, for classes of his own: ``--import one --import other``."""
_Class = TypeVar("_Class", bound=type[Any])
_WORDS = {"Input should be": "expected", "greater than or equal to": "at least", "less than or equal to": "at most",
          "greater than": "above", "less than": "below"}  # fmt: skip


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(declared: _Class) -> _Class:
    """Make a class of annotated fields a frozen dataclass whose values are checked when it is made.

    Constraints stand at the field, as `Count`; what they cannot say goes into ``__post_init__``.
    ``section`` is what flags begin with where the settings are part of others: ``ppo`` of ``--ppo.iterations``. A value
    that does not fit, an unknown name among the arguments included, is a `ConfigError` that names the flag.
    """
    config = ConfigDict(extra="forbid")
    made: Any = dataclass(frozen=True, config=config)(declared)
    plain = made.__init__

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            plain(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError("; ".join(_refusal(made, item) for item in error.errors())) from error

    made.__init__ = __init__
    result: _Class = made
    return result


def as_plain(made: Any) -> dict[str, Any]:
    """Return settings as JSON can hold them; the class makes them from that again."""
    plain: dict[str, Any] = TypeAdapter(type(made)).dump_python(made, mode="json")
    return plain


def _refusal(declared: Any, item: Any) -> str:
    names = [getattr(declared, "section", ""), *(part for part in item["loc"] if isinstance(part, str))]
    flag = "--" + ".".join(filter(None, names)).replace("_", "-")
    if item["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(declared)]
        return f"{flag}: no such setting.{did_you_mean(names[-1], known)}"
    message = functools.reduce(lambda text, word: text.replace(word, _WORDS[word]), _WORDS, item["msg"])
    return f"{flag} is {item['input']!r}, {message}."
