"""The benchmark of latency counts steps and escalations of requests as the service does, and times them."""

import asyncio

from benchmarks import latency


def test_requests_are_counted_and_timed(router, upstreams):
    url, before = router.url.removesuffix("/v1"), len(upstreams.large.lines("delivered", "completions"))
    found, again = asyncio.run(latency.load([url, url], 6))
    assert (found.calls == again.calls).all()  # the same questions, answered alike
    assert found.calls.shape == (6, 3) and (found.calls[:, 0] == 1).all()
    steps, large = found.calls[:, 1], found.calls[:, 2]
    assert (steps >= 1).all() and (large <= steps).all() and 0 < large.sum() < steps.sum()
    router.idle()
    asked = len(upstreams.large.lines("delivered", "completions")) - before
    assert 2 * large.sum() <= asked  # those of the requests before, that open connections, as well
    think = upstreams.small.think + upstreams.prm.think
    assert (found.seconds >= think * steps + upstreams.large.think * large).all()
