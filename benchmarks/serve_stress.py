"""What the service does when it has too much to do, or nobody to ask, on loopback.

    python -m benchmarks.serve_stress --parts load refuse cap drain reload     # six minutes on two cores

Each part starts stand-ins for vLLM servers (`benchmarks.upstream`) and the service in processes of their own. Stand-ins
answer the same prompt with the same step, so a question has one answer as long as nothing fails, whoever else asks.

load    questions by 8 clients, then for a minute as many as twice what the service can answer, while somebody polls
        /health, /ready and /live
refuse  honest requests alone, beside requests of 250 KB that are refused, 50 a second, and all of those at once
cap     requests under caps on large tokens and escalations, streams and whole answers, some of whose clients leave,
        while the small model and the scorer are killed and come back; what was decoded is what the stand-ins noted
drain   SIGTERM during 50 streams: of a service that can finish them, and of one that cannot
reload  two policies, by name, by setting and by a hash of the request, under load, while SIGHUP has them read again
        twice a second
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import aiohttp
import numpy as np

from benchmarks.stage import DEMO, Running, Stage, body, connected, counters, stage
from benchmarks.upstream import StandIn
from rollouts.text.steps import LARGE, ROLES

_QUESTIONS = 100  # that load asks again and again
Part = Literal["load", "refuse", "cap", "drain", "reload"]


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        parts: What is done.
        seconds: How long the loads last.
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

    parts: tuple[Part, ...] = get_args(Part)
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
        policy: Who decided.
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
    policy: str | None = None


async def _ask(client: aiohttp.ClientSession, url: str, index: int, patience: float = 300.0, **more: Any) -> Seen:
    """Ask one question and read the answer; leave after `patience` seconds."""
    seen, began = Seen(index), time.monotonic()
    options = {"include_usage": True} if more.get("stream") else None
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            async with client.post(
                f"{url}/v1/chat/completions", json=body(index, stream_options=options, **more)
            ) as answer:
                if answer.content_type == "text/event-stream":
                    await _read_stream(answer, seen)
                else:
                    _read_body(await answer.json(), seen)
                seen.status = answer.status
    seen.seconds = time.monotonic() - began
    return seen


def _read_body(told: dict[str, Any], seen: Seen) -> None:
    seen.text = told["choices"][0]["message"]["content"] if "choices" in told else told["error"]["message"]
    _read_usage(told, seen)
    trim = told.get("trim", {})
    seen.notes, seen.share, seen.policy = (
        trim.get("fallbacks", []),
        trim.get("large_token_share", 0.0),
        trim.get("policy"),
    )


def _read_usage(told: dict[str, Any], seen: Seen) -> None:
    if told.get("usage"):
        models = told["usage"]["models"]
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


async def _closed(client: aiohttp.ClientSession, url: str, indices: range, clients: int, **more: Any) -> list[Seen]:
    """Ask with a fixed number of clients, each one question after the other."""
    left, seen = iter(indices), []

    async def one() -> None:
        for index in left:
            seen.append(await _ask(client, url, index, **more))

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen


def _spent(metrics: dict[str, float], model: str, kind: str) -> int:
    return int(metrics.get(f'trim_tokens_total{{kind="{kind}",model="{model}"}}', 0))


def _times(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_s": round(float(np.percentile(seconds, p)), 3) for p in (50, 95)} if seconds else {}


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
                    told = await answer.json()
                self.seconds.append(time.monotonic() - began)
                self.statuses[f"{path} {answer.status} {told['status']}"] += 1
            await asyncio.sleep(every)


async def _load(config: Config, service: Running) -> dict[str, Any]:
    draw, url = random.Random(config.seed), service.url
    async with connected() as client:
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
        metrics = await counters(client, url)
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
        "said_down": service.log.read_text().count("is down"),
        "tracebacks": service.tracebacks,
    }


# ---------------------------------------------------------------- refused requests


async def _refuse(config: Config, service: Running) -> dict[str, Any]:
    url = service.url
    padding = "Be brief. " * (config.kilobytes * 100)
    raw = json.dumps({"messages": [{"role": "system", "content": padding}, *body(0)["messages"]]}).encode()
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

    async with connected() as client:
        await _closed(client, url, range(_QUESTIONS), 8)
        highest = [service.megabytes]
        watching = asyncio.create_task(_highest(service, highest))
        found: dict[str, Any] = {"megabytes_before": round(highest[0], 1)}
        beside = {"alone": (0, 0.0), "beside_50_a_second": (10, 0.2), "beside_all_at_once": (config.refused, 0.0)}
        for name, (clients, pause) in beside.items():
            highest[:] = [service.megabytes]
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
        return {**found, "megabytes_after": round(service.megabytes, 1), "refused_with": dict(statuses)}


async def _highest(service: Running, found: list[float]) -> None:
    while True:
        found.append(service.megabytes)
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


async def _cap(config: Config, on: Stage, urls: list[str]) -> dict[str, Any]:
    draw = random.Random(config.seed)
    victims = [on.standins["small"], on.standins["prm"]]
    left, seen = iter(range(1, config.capped + 1)), list[Seen]()

    async def one(client: aiohttp.ClientSession) -> None:
        for index in left:
            leaves = draw.uniform(0.05, 0.8) if draw.random() < 0.1 else 300.0
            stream = draw.random() < 0.5
            seen.append(await _ask(client, urls[index % len(urls)], index, leaves, stream=stream))

    async with connected() as client:
        disturbing = asyncio.create_task(_disturb(victims, draw))
        await asyncio.gather(*(one(client) for _ in range(config.clients)))
        disturbing.cancel()
        await asyncio.sleep(1.0)
        metrics = [await counters(client, url) for url in urls]
    asked = {role: on.standins[role].asked("decoded", "left") for role in ROLES}
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
        notes_of = on.standins[role].notes
        found[role] = {word: sum(note.tokens for note in notes_of(word)) for word in ("decoded", "delivered", "left")}
        for kind in ("completion", "aborted"):
            found[role][f"metrics_{kind}"] = sum(_spent(each, role, kind) for each in metrics)
    return found


def _told_rightly(seen: Seen, role: str, noted: int) -> bool:
    """Whether an answer tells what a stand-in noted: exactly, or within what may have been decoded in vain."""
    assert seen.decoded is not None
    return seen.decoded[role] <= noted <= seen.decoded[role] + seen.aborted[role]


# ---------------------------------------------------------------- the end


async def _drain(config: Config, on: Stage, stuck: bool, service: Running) -> dict[str, Any]:
    on.standins["prm"].control(mode="ok")
    ready: list[tuple[float, int]] = []

    async def watch(client: aiohttp.ClientSession) -> None:
        while True:
            with suppress(aiohttp.ClientError):
                async with client.get(f"{service.url}/ready") as answer:
                    ready.append((time.monotonic(), answer.status))
            await asyncio.sleep(0.02)

    async with connected() as client:
        asking = [asyncio.create_task(_ask(client, service.url, index, stream=True)) for index in range(config.streams)]
        watching = asyncio.create_task(watch(client))
        await asyncio.sleep(0.3)
        if stuck:
            on.standins["prm"].control(mode="stall")
        under_way = sum(not task.done() for task in asking)
        told = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        seen = await asyncio.gather(*asking)
        seconds = time.monotonic() - told
        watching.cancel()
    code = await asyncio.to_thread(service.process.wait, 30)
    return {
        "streams_under_way": under_way,
        "unready_after_s": round(next(at for at, status in ready if status == 503) - told, 3),
        "ready_again": any(status == 200 for at, status in ready if at > told + 0.1),
        "streams_took_s": round(seconds, 2),
        "streams_ended": dict(Counter(each.ending if each.status == 200 else f"{each.status}" for each in seen)),
        "process_took_s": round(time.monotonic() - told, 2),
        "exit_code": code,
    }


# ---------------------------------------------------------------- policies that change


async def _reload(config: Config, service: Running) -> dict[str, Any]:
    """Ask with many clients, by no name, by one and with settings, while the policies are read again and again."""
    names = (None, "careful", "careful@budget=0.2", "careful@lam=0.003")
    seen, over = list[Seen](), False

    async def one(client: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(f"{config.seed} {number}")
        while not over:
            name = draw.choice(names)
            index = draw.randrange(_QUESTIONS)
            more: dict[str, Any] = {} if name is None else {"model": name}
            seen.append(await _ask(client, service.url, index, stream=draw.random() < 0.5, **more))

    async with connected() as client:
        asking = [asyncio.create_task(one(client, number)) for number in range(config.clients)]
        end, told = time.monotonic() + config.seconds, 0
        while time.monotonic() < end:
            await asyncio.sleep(0.5)
            service.process.send_signal(signal.SIGHUP)
            told += 1
        over = True
        await asyncio.gather(*asking)
        counted = await counters(client, service.url)
    return {
        "signals": told,
        "reloads": int(counted['trim_reloads_total{result="read"}']),
        "requests": len(seen),
        "statuses": dict(Counter(each.status for each in seen)),
        "ended": dict(Counter(each.ending for each in seen)),
        "by_policy": {
            each: int(counted[f'trim_policy_requests_total{{policy="{each}",status="200"}}'])
            for each in ("trim-thr", "careful")
        },
        "fallbacks": int(counted["trim_fallbacks_total"]),
        "took": _times([each.seconds for each in seen]),
        "tracebacks": service.tracebacks,
    }


# ---------------------------------------------------------------- all


def measure(part: Part, config: Config) -> dict[str, Any]:
    """Return the figures of a part."""
    found: dict[str, Any] = {}
    if part == "load":
        with stage(small=0.15, large=0.4, prm=0.05) as on, on.service() as service:
            found = asyncio.run(_load(config, service))
    elif part == "refuse":
        with stage(small=0.05, large=0.1, prm=0.02) as on, on.service() as service:
            found = asyncio.run(_refuse(config, service)) | {"tracebacks": service.tracebacks}
    elif part == "cap":
        with stage(small=0.03, large=0.06, prm=0.02) as on, ExitStack() as stack:
            capped = on.policy(max_large_tokens=config.large_tokens, max_escalations=config.escalations)
            modes = [("large", "large"), ("error", "large"), ("large", "small"), ("error", "error")]
            flags = [
                ("--upstream-timeout", 3.0, "--when-small-fails", small, "--when-scorer-fails", scorer)
                for small, scorer in modes
            ]
            services = [stack.enter_context(on.service(*each, policy=capped)) for each in flags]
            found = asyncio.run(_cap(config, on, [each.url for each in services]))
            found["tracebacks"] = sum(each.tracebacks for each in services)
    elif part == "reload":
        with stage(small=0.05, large=0.1, prm=0.02) as on:
            also = ("--also", f"careful={DEMO}", "--budget", 0.3, "--ab", "careful=0.3")
            with on.service(*also) as service:
                found = asyncio.run(_reload(config, service))
    else:
        with stage(small=0.15, large=0.4, prm=0.05) as on:
            for stuck in (False, True):
                with on.service("--drain-seconds", config.drain) as service:
                    result = asyncio.run(_drain(config, on, stuck, service))
                    found["stuck" if stuck else "able"] = result | {"tracebacks": service.tracebacks}
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
