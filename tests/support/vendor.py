"""A vendor's API for chats with a reasoning model: it solves tinymath step by step, and bills more than it shows."""

from __future__ import annotations

import re
from typing import Any

from fake_server import FakeServer

from rollouts.tinymath.problems import solution_steps

HIDDEN = 40  # tokens of each answer that nobody sees
REFUSED = ("max_tokens", "top_k", "min_p", "repetition_penalty")
QUOTA = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
_QUESTION = re.compile(r"Problem:\n(?P<question>.*?)\n\n", re.DOTALL)
_STEP = re.compile(r"\(step (?P<number>\d+)\)")


class Vendor(FakeServer):
    """Lists no models, refuses what it does not know, and wants `max_completion_tokens`."""

    def answer(self, path: str, body: Any) -> Any:
        told = super().answer(path, body)
        if path == "/v1/models":
            return 404, {}, {"error": {"message": "Not Found"}}
        if self.fault(path, body, self.counts[path] - 1) is not None:
            return told
        if refused := [name for name in REFUSED if name in body]:
            hint = ", use max_completion_tokens" if refused[0] == "max_tokens" else ""
            return 400, {}, {"error": {"message": f"Unsupported parameter: {refused[0]}{hint}"}}
        return told

    def good(self, path: str, body: Any) -> Any:
        if path != "/v1/chat/completions":
            return {}
        content = body["messages"][-1]["content"]
        asked, number = _QUESTION.search(content), _STEP.search(content)
        text = "OK"
        if asked and number:
            steps = solution_steps(asked["question"])
            text = steps[min(int(number["number"]), len(steps)) - 1].strip()
        tokens = HIDDEN + len(text)
        usage = {"prompt_tokens": 30, "completion_tokens": tokens, "total_tokens": 30 + tokens}
        usage |= {"completion_tokens_details": {"reasoning_tokens": HIDDEN}}
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}

    def asked(self) -> list[Any]:
        """The bodies that asked for steps."""
        return [body for path, body in self.seen if body and "Problem:" in body["messages"][-1]["content"]]
