"""What the service does when it has too much to do, or nobody to ask, on loopback.

    python -m benchmarks.serve_stress --parts load refuse cap drain     # five minutes on two cores

Each part starts stand-ins for vLLM servers (`benchmarks.upstream`) and the service in processes of their own. Stand-ins
answer the same prompt with the same step, so a question has one answer as long as nothing fails, whoever else asks.

load    questions by 8 clients, then for a minute as many as twice what the service can answer, while somebody polls
        /health, /ready and /live
refuse  honest requests alone, beside requests of 250 KB that are refused, 50 a second, and all of those at once
cap     requests under caps on large tokens and escalations, streams and whole answers, some of whose clients leave,
        while the small model and the scorer are killed and come back; what was decoded is what the stand-ins noted
drain   SIGTERM during 50 streams: of a service that can finish them, and of one that cannot
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np

from agents.routers import artefact
from agents.routers.base import Threshold
from benchmarks.serve import process, url_of
from benchmarks.upstream import StandIn, record
from rollouts.text.steps import LARGE, ROLES

_ABOUT = {"small": "tinymath-small", "large": "tinymath-large", "scorer": "tinymath-prm", "max_steps": 16}
_QUESTIONS = 100  # that load asks again and again
Part = Literal["load", "refuse", "cap", "drain"]


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        parts: What is done.
        seconds: How long the load lasts.
        overload: Its requests per second, as a multiple of what the service can answer.
        saturating: Clients that measure what it can answer.
        refused: Requests that are refused.
        kilobytes: Their size.
        capped: Requests under caps.
        clients: Clients that send them.
        large_tokens: Cap on large tokens, M.
        escalations: Cap on escalations, K.
        streams: Streams under way when the service is told to end.
        drain: Its --drain-seconds.
        seed: Of what happens by chance.
    """

    parts: tuple[Part, ...] = ("load", "refuse", "cap", "drain")
    seconds: float = 60.0
    overload: float = 2.0
    saturating: int = 128
    refused: int = 500
    kilobytes: int = 250
    capped: int = 1000
    clients: int = 32
    large_tokens: int = 30
    escalations: int = 3
    streams: int = 50
    drain: float = 8.0
    seed: int = 0


@dataclass
class Seen:
    """What a client saw of a request.

    Attributes:
        index: Number in the question.
        status: HTTP status; 0 if the client left.
        seconds: Until the answer's end.
        text: The answer.
        decoded: Completion tokens by role as the answer tells them; None if it does not.
        aborted: Likewise, the most that may have been decoded in vain.
        notes: What the answer says of faults.
        share: Large-token share of a whole answer.
        ending: How a stream ended: ``done``, ``error`` or ``cut`` without [DONE].
    """

    index: int
    status: int = 0
    seconds: float = 0.0
    text: str = ""
    decoded: dict[str, int] | None = None
    aborted: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    share: float = 0.0
    ending: str = "done"


def _body(index: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Let a={index}+33, b=a+49, c=b*12. Find c."}], **more}


async def _ask(client: aiohttp.ClientSession, url: str, index: int, patience: float = 300.0, **more: Any) -> Seen:
    """Ask one question and read the answer; leave after `patience` seconds."""
    seen, began = Seen(index), time.monotonic()
    options = {"include_usage": True} if more.get("stream") else None
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            async with client.post(
                f"{url}/v1/chat/completions", json=_body(index, stream_options=options, **more)
            ) as answer:
                if answer.content_type == "text/event-stream":
                    await _read_stream(answer, seen)
                else:
                    _read_body(await answer.json(), seen)
                seen.status = answer.status
    seen.seconds = time.monotonic() - began
    return seen


def _read_body(body: dict[str, Any], seen: Seen) -> None:
    seen.text = body["choices"][0]["message"]["content"] if "choices" in body else body["error"]["message"]
    _read_usage(body, seen)
    seen.notes = body.get("trim", {}).get("fallbacks", [])
    seen.share = body.get("trim", {}).get("large_token_share", 0.0)


def _read_usage(body: dict[str, Any], seen: Seen) -> None:
    if body.get("usage"):
        models = body["usage"]["models"]
        seen.decoded, seen.aborted = (
            {role: models[role][f"{kind}_tokens"] for role in ROLES} for kind in ("completion", "aborted")
        )


async def _read_stream(answer: aiohttp.ClientResponse, seen: Seen) -> None:
    seen.ending = "cut"
    ending = "done"
    with suppress(aiohttp.ClientError):
        async for line in answer.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    ending = "error"
                seen.text += "".join(choice["delta"]["content"] for choice in chunk.get("choices", ()))
                seen.notes = chunk.get("trim", {}).get("fallbacks", seen.notes)
                _read_usage(chunk, seen)
            elif line.startswith(b"data: [DONE]"):
                seen.ending = ending


@dataclass
class Stage:
    """Stand-ins and services.

    Attributes:
        standins: By role.
        folder: For files.
    """

    standins: dict[str, StandIn]
    folder: Path

    @contextmanager
    def service(self, *flags: object, **about: Any) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
        """Run a service; what it logs is in the file."""
        number = sum(1 for _ in self.folder.iterdir())
        policy = artefact.save(Threshold(0.3), self.folder / f"policy-{number}", _ABOUT | about)
        urls = [part for role, each in self.standins.items() for part in (f"--{role}", each.url)]
        log = self.folder / f"service-{number}.log"
        with log.open("wb") as errors, process("agents", "serve", "--policy", policy, "--port", 0, *urls, *flags,
                                               stderr=errors) as running:  # fmt: skip
            yield url_of(running), running, log


@contextmanager
def _stage(**think: float) -> Iterator[Stage]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replies = record(folder / "replies.json")
        standins = {role: StandIn(role, seconds, replies, spread=0.5) for role, seconds in think.items()}
        for each in standins.values():
            each.start()
            stack.callback(each.kill)
        for each in standins.values():
            each.wait()
        yield Stage(standins, folder)


@asynccontextmanager
async def _client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:
        yield client


async def _closed(client: aiohttp.ClientSession, url: str, indices: range, clients: int, **more: Any) -> list[Seen]:
    """Ask with a fixed number of clients, each one question after the other."""
    left, seen = iter(indices), []

    async def one() -> None:
        for index in left:
            seen.append(await _ask(client, url, index, **more))

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen


async def _metrics(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with client.get(f"{url}/metrics") as answer:
        rows = [line.rpartition(" ") for line in (await answer.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def _spent(metrics: dict[str, float], model: str, kind: str) -> int:
    return int(metrics.get(f'trim_tokens_total{{kind="{kind}",model="{model}"}}', 0))


def _times(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_s": round(float(np.percentile(seconds, p)), 3) for p in (50, 95)} if seconds else {}


def _tracebacks(log: Path) -> int:
    return log.read_text().count("Traceback")


# ---------------------------------------------------------------- load


@dataclass
class _Poll:
    """What somebody saw who watches the service."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    async def watch(self, client: aiohttp.ClientSession, url: str, every: float = 0.1) -> None:
        while True:
            for path in ("health", "ready", "live"):
                began = time.monotonic()
                async with client.get(f"{url}/{path}") as answer:
                    body = await answer.json()
                self.seconds.append(time.monotonic() - began)
                self.statuses[f"{path} {answer.status} {body['status']}"] += 1
            await asyncio.sleep(every)


async def _load(config: Config, stage: Stage, url: str, log: Path) -> dict[str, Any]:
    draw = random.Random(config.seed)
    async with _client() as client:
        alone = await _closed(client, url, range(_QUESTIONS), 8)
        began = time.monotonic()
        busy = await _closed(client, url, range(5 * config.saturating), config.saturating)
        able = len(busy) / (time.monotonic() - began)
        known = {seen.index: seen for seen in alone}
        poll = _Poll()
        watching = asyncio.create_task(poll.watch(client, url))
        asking: list[asyncio.Task[Seen]] = []
        began = time.monotonic()
        while (now := time.monotonic() - began) < config.seconds:
            while len(asking) < now * config.overload * able:
                asking.append(asyncio.create_task(_ask(client, url, draw.randrange(_QUESTIONS))))
            await asyncio.sleep(0.005)
        seen = await asyncio.gather(*asking)
        watching.cancel()
        answered = [each for each in seen if each.status == 200]
        metrics = await _metrics(client, url)
    return {
        "able_per_second": round(able, 1),
        "sent_per_second": round(len(seen) / config.seconds, 1),
        "answered_per_second": round(len(answered) / config.seconds, 1),
        "statuses": dict(Counter(each.status for each in seen)),
        "alone": _times([each.seconds for each in alone]),
        "answered": _times([each.seconds for each in answered]),
        "refused": _times([each.seconds for each in seen if each.status != 200]),
        "fallbacks": int(metrics["trim_fallbacks_total"]),
        "other_answers_than_alone": sum(each.text != known[each.index].text for each in answered),
        "large_share_alone": round(float(np.mean([known[each.index].share for each in answered])), 4),
        "large_share": round(float(np.mean([each.share for each in answered])), 4),
        "polls": dict(poll.statuses),
        "polls_took": _times(poll.seconds),
        "said_down": log.read_text().count("is down"),
        "tracebacks": _tracebacks(log),
    }


# ---------------------------------------------------------------- refused requests


async def _refuse(config: Config, url: str, pid: int) -> dict[str, Any]:
    padding = "Be brief. " * (config.kilobytes * 100)
    raw = json.dumps({"messages": [{"role": "system", "content": padding}, *_body(0)["messages"]]}).encode()
    statuses: Counter[int] = Counter()

    async def refuse(client: aiohttp.ClientSession) -> None:
        headers = {"Content-Type": "application/json"}
        async with client.post(f"{url}/v1/chat/completions", data=raw, headers=headers) as answer:
            statuses[answer.status] += 1
            await answer.read()

    async def some(client: aiohttp.ClientSession, count: int, pause: float) -> None:
        for _ in range(count):
            await refuse(client)
            await asyncio.sleep(pause)

    async with _client() as client:
        await _closed(client, url, range(_QUESTIONS), 8)
        highest = [_megabytes(pid)]
        watching = asyncio.create_task(_highest(pid, highest))
        found: dict[str, Any] = {"megabytes_before": round(highest[0], 1)}
        beside = {"alone": (0, 0.0), "beside_50_a_second": (10, 0.2), "beside_all_at_once": (config.refused, 0.0)}
        for name, (clients, pause) in beside.items():
            highest[:] = [_megabytes(pid)]
            count = config.refused // max(clients, 1)
            refusing = [asyncio.create_task(some(client, count, pause)) for _ in range(clients)]
            honest = await _closed(client, url, range(_QUESTIONS), 8)
            unfinished = sum(not task.done() for task in refusing)
            await asyncio.gather(*refusing)
            found[name] = {
                **_times([each.seconds for each in honest]),
                "statuses": dict(Counter(each.status for each in honest)),
                "fallbacks": sum(len(each.notes) for each in honest),
                "most_megabytes": round(max(highest), 1),
                "still_refusing_at_the_end": unfinished,
            }
        watching.cancel()
        return {**found, "megabytes_after": round(_megabytes(pid), 1), "refused_with": dict(statuses)}


def _megabytes(pid: int) -> float:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(row.split()[1] for row in rows if row.startswith("VmRSS"))) / 1024


async def _highest(pid: int, found: list[float]) -> None:
    while True:
        found.append(_megabytes(pid))
        await asyncio.sleep(0.02)


# ---------------------------------------------------------------- caps


async def _disturb(victims: list[StandIn], draw: random.Random) -> None:
    """Kill one or both of some stand-ins and let them come back, again and again."""
    while True:
        gone = draw.sample(victims, draw.choice((1, 1, 2)))
        for each in gone:
            await asyncio.to_thread(each.kill)
        await asyncio.sleep(draw.uniform(0.1, 1.0))
        for each in gone:
            each.start()
        for each in gone:
            await asyncio.to_thread(each.wait)
        await asyncio.sleep(draw.uniform(0.1, 1.5))


async def _cap(config: Config, stage: Stage, urls: list[str]) -> dict[str, Any]:
    draw = random.Random(config.seed)
    victims = [stage.standins["small"], stage.standins["prm"]]
    left, seen = iter(range(1, config.capped + 1)), list[Seen]()

    async def one(client: aiohttp.ClientSession) -> None:
        for index in left:
            leaves = draw.uniform(0.05, 0.8) if draw.random() < 0.1 else 300.0
            stream = draw.random() < 0.5
            seen.append(await _ask(client, urls[index % len(urls)], index, leaves, stream=stream))

    async with _client() as client:
        disturbing = asyncio.create_task(_disturb(victims, draw))
        await asyncio.gather(*(one(client) for _ in range(config.clients)))
        disturbing.cancel()
        await asyncio.sleep(1.0)
        metrics = [await _metrics(client, url) for url in urls]
    asked = {role: stage.standins[role].asked("decoded", "left") for role in ROLES}
    large = asked[LARGE]
    notes = " ".join(note for each in seen for note in each.notes)
    told = [each for each in seen if each.decoded is not None]
    found: dict[str, Any] = {
        "requests": len(seen),
        "statuses": dict(Counter(each.status for each in seen)),
        "streams_ended": dict(Counter(each.ending for each in seen if each.status)),
        "faults": {word: notes.count(word) for word in ("small (", "scorer (", "large (", "cap")},
        "most_large_tokens": max(map(sum, large.values())),
        "above_M": sum(sum(tokens) > config.large_tokens for tokens in large.values()),
        "above_K": sum(len(tokens) > config.escalations for tokens in large.values()),
        "told": len(told),
        "told_wrongly": sum(
            not _told_rightly(each, role, sum(asked[role].get(each.index, ()))) for each in told for role in ROLES
        ),
        "in_flight": [int(each["trim_requests_in_flight"]) for each in metrics],
    }
    for role in ROLES:
        notes_of = stage.standins[role].notes
        found[role] = {word: sum(note.tokens for note in notes_of(word)) for word in ("decoded", "delivered", "left")}
        for kind in ("completion", "aborted"):
            found[role][f"metrics_{kind}"] = sum(_spent(each, role, kind) for each in metrics)
    return found


def _told_rightly(seen: Seen, role: str, noted: int) -> bool:
    """Whether an answer tells what a stand-in noted: exactly, or within what may have been decoded in vain."""
    assert seen.decoded is not None
    return seen.decoded[role] <= noted <= seen.decoded[role] + seen.aborted[role]


# ---------------------------------------------------------------- the end


async def _drain(config: Config, stage: Stage, stuck: bool, url: str, running: subprocess.Popen[str]) -> dict[str, Any]:
    stage.standins["prm"].control(mode="ok")
    ready: list[tuple[float, int]] = []

    async def watch(client: aiohttp.ClientSession) -> None:
        while True:
            with suppress(aiohttp.ClientError):
                async with client.get(f"{url}/ready") as answer:
                    ready.append((time.monotonic(), answer.status))
            await asyncio.sleep(0.02)

    async with _client() as client:
        asking = [asyncio.create_task(_ask(client, url, index, stream=True)) for index in range(config.streams)]
        watching = asyncio.create_task(watch(client))
        await asyncio.sleep(0.3)
        if stuck:
            stage.standins["prm"].control(mode="stall")
        under_way = sum(not task.done() for task in asking)
        told = time.monotonic()
        running.send_signal(signal.SIGTERM)
        seen = await asyncio.gather(*asking)
        seconds = time.monotonic() - told
        watching.cancel()
    code = await asyncio.to_thread(running.wait, 30)
    return {
        "streams_under_way": under_way,
        "unready_after_s": round(next(at for at, status in ready if status == 503) - told, 3),
        "ready_again": any(status == 200 for at, status in ready if at > told + 0.1),
        "streams_took_s": round(seconds, 2),
        "streams_ended": dict(Counter(each.ending if each.status == 200 else f"{each.status}" for each in seen)),
        "process_took_s": round(time.monotonic() - told, 2),
        "exit_code": code,
    }


# ---------------------------------------------------------------- all


def measure(part: Part, config: Config) -> dict[str, Any]:
    """Return the figures of a part."""
    found: dict[str, Any] = {}
    if part == "load":
        with _stage(small=0.15, large=0.4, prm=0.05) as stage, stage.service() as (url, _, log):
            found = asyncio.run(_load(config, stage, url, log))
    elif part == "refuse":
        with _stage(small=0.05, large=0.1, prm=0.02) as stage, stage.service() as (url, running, log):
            found = asyncio.run(_refuse(config, url, running.pid)) | {"tracebacks": _tracebacks(log)}
    elif part == "cap":
        caps = {"max_large_tokens": config.large_tokens, "max_escalations": config.escalations}
        with _stage(small=0.03, large=0.06, prm=0.02) as stage, ExitStack() as stack:
            timeout = ("--upstream-timeout", 3.0)
            modes = [("large", "large"), ("error", "large"), ("large", "small"), ("error", "error")]
            flags = [("--when-small-fails", small, "--when-scorer-fails", scorer) for small, scorer in modes]
            running = [stack.enter_context(stage.service(*timeout, *each, **caps)) for each in flags]
            found = asyncio.run(_cap(config, stage, [url for url, _, _ in running]))
            found["tracebacks"] = sum(_tracebacks(log) for _, _, log in running)
    else:
        with _stage(small=0.15, large=0.4, prm=0.05) as stage:
            for stuck in (False, True):
                with stage.service("--drain-seconds", config.drain) as (url, running, log):
                    result = asyncio.run(_drain(config, stage, stuck, url, running))
                    found["stuck" if stuck else "able"] = result | {"tracebacks": _tracebacks(log)}
    return found


def main() -> int:
    """Print the figures of each part."""
    import tyro

    config = tyro.cli(Config, description=__doc__)
    for part in config.parts:
        print(json.dumps({part: measure(part, config)}, indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
