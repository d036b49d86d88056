"""Tokenizers with their chat templates, out of the files of a model folder: as transformers has them, without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import NFC

from rollouts.errors import ConfigError


class ChatTokenizer:
    """A tokenizer, what its configuration says of special tokens, and its chat template.

    Attributes:
        name_or_path: Where it is from.
        backend_tokenizer: The tokenizer, without truncation and padding.
        chat_template: Source of the template; None if there is none.
        special_tokens_map: Texts of special tokens by name, ``bos_token`` and so on, as templates know them.
    """

    def __init__(self, name: str, backend: Tokenizer, settings: Mapping[str, Any], template: str | None) -> None:
        """Add the tokens that the configuration knows and the tokenizer does not.

        Args:
            name: Where it is from.
            backend: The tokenizer of ``tokenizer.json``.
            settings: Content of ``tokenizer_config.json``.
            template: Content of ``chat_template.jinja``; None: that of `settings`.
        """
        self.name_or_path, self.backend_tokenizer = name, backend
        own = settings.get("chat_template")
        own = {each["name"]: each["template"] for each in own} if isinstance(own, list) else own
        self.chat_template: str | None = template or (own.get("default") if isinstance(own, dict) else own)
        others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        named = {key: value for key, value in settings.items() if key.endswith("_token")}
        named |= others if isinstance(others, dict) else {}
        found = {key: _content(value) for key, value in named.items() if isinstance(value, str | dict)}
        self.special_tokens_map = {key: text for key, text in found.items() if text}
        added = sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
        backend.add_tokens([AddedToken(**token) for _, token in added])
        known = {token.content for token in self.added_tokens_decoder.values()}
        special = [*self.special_tokens_map.values(), *map(_content, () if isinstance(others, dict) else others)]
        backend.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(special) if text not in known])
        if str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer") and backend.normalizer is None:
            backend.normalizer = NFC()  # as transformers has it, whatever the file says
        backend.no_truncation()
        backend.no_padding()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are cut out of texts first, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def _id(self, name: str) -> int | None:
        return self.backend_tokenizer.token_to_id(self.special_tokens_map.get(name, ""))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end of a sequence; None if there is none."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding; None if there is none."""
        return self._id("pad_token")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        tools: None = None,
        documents: None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return a conversation as the template writes it; the template may raise what it likes."""
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        usual = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        told = self.special_tokens_map | variables | usual | {"messages": messages}
        return str(_compiled(self.chat_template).render(**told))


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


class _Generation(Extension):
    """``{% generation %}`` marks what a model has written, for training; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    """Return a template in the environment of transformers, but for the date, which callers give."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made.from_string(template)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load a fast tokenizer from a folder or the hub.

    One without ``tokenizer.json`` is left to transformers, where that is installed.

    Raises:
        ConfigError: There is none, or it is not a fast one.
    """
    file = model_file(name, "tokenizer.json", revision)
    if file is None:
        return transformers_tokenizer(name, revision)
    try:
        settings = json.loads(_text(name, "tokenizer_config.json", revision) or "{}")
        if "added_tokens_decoder" not in settings:  # as earlier versions wrote them
            settings |= json.loads(_text(name, "special_tokens_map.json", revision) or "{}")
        template = _text(name, "chat_template.jinja", revision)
        return ChatTokenizer(name, Tokenizer.from_file(str(file)), settings, template)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ConfigError(f"The tokenizer at {name!r} is damaged ({' '.join(str(error).split())}).") from error


def transformers_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load a fast tokenizer with transformers, which can write it again, too.

    Raises:
        ConfigError: There is none, or it is not a fast one.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise ConfigError(
            f"No tokenizer at {name!r}: there is no tokenizer.json. Give a model folder; other formats are read with "
            "transformers (pip install 'trim-routing[rollouts]')."
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No tokenizer at {name!r} ({str(error).splitlines()[0]}). Give a model folder.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"The tokenizer of {name!r} has no fast implementation, which step cutting needs.")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def model_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return a small file of a model, from a folder or the hub's local cache, or fetched; None if it has none."""
    if Path(name).exists():
        found = Path(name) / file
        return found if found.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def model_settings(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the content of a model's ``config.json``; arguments as of `model_file`. Empty where none can be read."""
    try:
        found = json.loads(_text(name, "config.json", revision) or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(name: str, file: str, revision: str | None) -> str | None:
    found = model_file(name, file, revision)
    return None if found is None else found.read_text(encoding="utf-8")
