"""What tells one model from another: its content, not the name of its folder; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from rollouts.config import ModelConfig
from rollouts.errors import ConfigError
from rollouts.files.sealed import check, checksums, read_sealed, refusing_damage, write_sealed

_READ, _BLOCK = 512 << 20, 64 << 10  # bytes of a model that are read, and at once
_LONGEST_HEADER = 100_000_000  # bytes, as the format has it
_CONFIGURATION = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)
_WEIGHTS = (  # what engines look for, in this order
    *("model.safetensors.index.json", "model.safetensors", "*.safetensors", "pytorch_model.bin.index.json"),
    *("pytorch_model*.bin", "*.gguf", "*.bin", "*.pt", "*.pth"),
)
_CHECKSUMS = "checksums.json"  # in model folders that this package has written
_PASSING = ("_name_or_path", "name_or_path", "transformers_version")  # in JSON files: what each saving changes
_SERVED = {"name": "model", "root": "root", "owner": "owned_by", "window": "max_model_len"}


def identity(model: ModelConfig) -> dict[str, Any]:
    """Return what tells a model from others of its name, by part; parts that cannot be told are left out.

    ``weights`` are hashed tensor by tensor, so that neither folder nor sharding counts. Up to 512 MiB all of it is
    read; of larger models about as much, in blocks spread over every tensor: training changes some number in each
    block, but somebody who changes a single one may go unnoticed.

    Args:
        model: Where it is: a folder gives ``weights``, ``configuration`` and ``tokenizer``, a name on the hub the
            ``revision`` that the local cache has for it, a server its tokenizer alone (see `served`).

    Raises:
        ConfigError: A file cannot be read, or is not what was written (`note_checksums`).
    """
    if (file := Path(model.model) / _CHECKSUMS).is_file() and model.backend != "server":
        remedy = f"Restore its folder from a copy; if you changed it on purpose, delete {_CHECKSUMS}."
        with refusing_damage(file.parent, ConfigError, "model", remedy):
            check(file.parent, read_sealed(file)["checksums"])
    try:
        found = _parts(model)
    except OSError as error:
        raise ConfigError(f"{model.model}: cannot be read ({error}).") from error
    return {part: value for part, value in found.items() if value is not None}


def note_checksums(folder: Path) -> None:
    """Write into a model's folder what tells `identity` whether a file was damaged since."""
    write_sealed(folder / _CHECKSUMS, {"checksums": checksums(folder)})


def _parts(model: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    place = Path(model.model)
    if model.backend != "server":
        if place.exists():
            found["weights"] = _weights(place)
            found["configuration"] = _files(place, _CONFIGURATION)
        else:
            found["revision"] = _cached_revision(model.model, model.revision, "config.json")
    if model.tokenizer or place.is_dir():
        tokenizer, revision = model.tokenizer_source
        local = Path(tokenizer).is_dir()
        cached = None if local else _cached_revision(tokenizer, revision, "tokenizer_config.json")
        found["tokenizer"] = _files(Path(tokenizer), _TOKENIZER) if local else cached
    return found


def served(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a server says of its model: name, where it has it from, owner, window; of other backends nothing."""
    if "servers" not in description:
        return {}
    return {part: description[key] for part, key in _SERVED.items() if description.get(key) is not None}


def _cached_revision(name: str, revision: str | None, file: str) -> str | None:
    """Return the commit that a name on the hub stands for in the local cache, where it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def _files(folder: Path, names: tuple[str, ...]) -> str | None:
    """Return a hash of small files, JSON without what changes when it is saved again."""
    digest, some = blake2b(digest_size=8), False
    for name in names:
        if (file := folder / name).is_file():
            some = True
            digest.update(f"{name} ".encode() + _content(file))
    return digest.hexdigest() if some else None


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    if not file.name.endswith("config.json"):
        return content
    try:
        values = json.loads(content)
        return json.dumps({k: v for k, v in values.items() if k not in _PASSING}, sort_keys=True).encode()
    except (ValueError, AttributeError):
        return content


def _weights(place: Path) -> str | None:
    files = _weight_files(place) if place.is_dir() else [place]
    total = sum(file.stat().st_size for file in files)
    hashes: list[tuple[str, bytes]] = []
    for file in files:
        with file.open("rb") as handle:
            for name, begin, end in _tensors(file, handle):
                digest = blake2b(name.encode(), digest_size=16)
                for offset in _offsets(begin, end, total):
                    handle.seek(offset)
                    digest.update(handle.read(min(_BLOCK, end - offset)))
                hashes.append((name, digest.digest()))
    whole = blake2b(digest_size=8)
    for name, one in sorted(hashes):
        whole.update(f"{name} ".encode() + one)
    return whole.hexdigest() if files else None


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            if not pattern.endswith(".index.json"):
                return found
            try:
                names = set(json.loads(found[0].read_bytes())["weight_map"].values())
                if listed := [folder / name for name in sorted(names) if (folder / name).is_file()]:
                    return listed
            except (ValueError, LookupError, AttributeError, TypeError):
                pass  # a damaged index: the engine will say so
    return []


def _tensors(file: Path, handle: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors of a file (what names it with its type and shape, begin, end); of other formats the whole."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        length = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(length) if length < min(size, _LONGEST_HEADER) else b"")
            header.pop("__metadata__", None)
            places = [[min(length + 8 + at, size) for at in tensor["data_offsets"]] for tensor in header.values()]
            names = [f"{name} {tensor['dtype']} {tensor['shape']}" for name, tensor in header.items()]
            yield from [(name, begin, end) for name, (begin, end) in zip(names, places, strict=True)]
            return
        except (ValueError, LookupError, AttributeError, TypeError):
            pass  # a damaged file: the engine will say so
    yield f"{file.name} {size}", 0, size


def _offsets(begin: int, end: int, total: int) -> Iterator[int]:
    """Yield where to read: everywhere, or at places that are spread evenly."""
    if total <= _READ:
        yield from range(begin, end, _BLOCK)
        return
    count = max(1, (end - begin) * _READ // total // _BLOCK)
    for number in range(count):
        middle = begin + (end - begin) * (2 * number + 1) // (2 * count)
        yield max(begin, min(middle - _BLOCK // 2, end - _BLOCK))
