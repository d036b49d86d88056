"""The playground's page: the report's cards and colours, a form, and the problems that it can draw."""

from __future__ import annotations

import re

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse

from agents.report.render import SHARED, assembled, part
from rollouts.tinymath import generate_problems

_PROBLEMS = 200  # of the validation split: the models and the shipped router were fitted on others


def add_playground(app: Starlette, *, tinymath: bool) -> None:
    """Show the page at /.

    Args:
        app: The service's application.
        tinymath: Whether the policy is for the embedded family, of which problems with known answers are at hand.
    """
    html = render(tinymath=tinymath)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    headers = {
        "Content-Security-Policy": f"{policy[1]}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    async def playground(_: Request) -> HTMLResponse:
        """Return the playground's page."""
        return HTMLResponse(html, headers=headers)

    app.add_route("/", playground)


def render(*, tinymath: bool) -> str:
    """Return the page; it asks nothing of any other server."""
    known = generate_problems("validation", _PROBLEMS) if tinymath else []
    page, own, script = (part(f"play.{kind}", __package__) for kind in ("html", "css", "js"))
    content = {"problems": [[problem.question, problem.answer] for problem in known]}
    style, scripts = part("page.css") + own, (*map(part, SHARED), script)
    return assembled("Router playground", page, style, scripts, content, "connect-src 'self'; ")
