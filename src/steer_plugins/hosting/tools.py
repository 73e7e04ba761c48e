"""The tools of a session as a Model Context Protocol server. Needs the ``mcp`` package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from starlette.applications import Starlette

from .. import __version__
from ..errors import SteerError
from .running import passing
from .session import Session

T = TypeVar("T")

INSTRUCTIONS = (
    "These tools change how the language model behind this server writes: a steering adds directions to its hidden state. "
    "list_vectors says which directions there are and how strong each may be; set_steering turns them up or down, such as "
    '"succinctness:0.6" for terser replies; "" turns all off. It acts on all replies from now on, until it is changed.'
)


def make_server(session: Session) -> MCPServer[Any]:
    """A server whose tools act on ``session``."""
    server: MCPServer[Any] = MCPServer(
        "steer", title="Activation steering", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING"
    )

    async def call(work: Callable[[], T]) -> T:
        try:
            return await to_thread.run_sync(work)
        except SteerError as error:
            raise ToolError(str(error)) from None

    @server.tool()
    async def list_vectors() -> dict[str, Any]:
        """List the steering vectors: name, what both ends are called, and the largest strength that may be set, either way."""
        return {"vectors": await call(session.vectors), "may_fit": session.may_fit}

    @server.tool()
    async def get_steering() -> dict[str, Any]:
        """Say what steers the replies now, as a text such as "mood:0.6 + succinctness:-0.3"; "" is nothing."""
        return {"steering": session.current()}

    @server.tool()
    async def set_steering(steering: str) -> dict[str, Any]:
        """Replace the steering of all replies from now on, such as "succinctness:0.6 + mood:-0.2": NAME:STRENGTH, joined by +.

        Strength 1 is the full effect, 0 none, below 0 the opposite. An empty text turns steering off.
        """
        return await call(lambda: session.set(steering))

    @server.tool()
    async def fit_vector(
        name: str, prompt: str = "", opposite: str = "", pairs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Make a new steering vector, if that is allowed. It takes a while.

        Give either a system prompt that asks for the behaviour ("You answer in rhymes.") and perhaps one for its opposite, or
        pairs of texts, {"positive": ..., "negative": ...}, five or more.
        """
        return await call(lambda: session.fit(name, prompt=prompt, opposite=opposite, pairs=pairs or ()))

    @server.tool()
    async def read_projection(text: str, vector: str = "", reply: str = "") -> dict[str, Any]:
        """Measure how far a text lies along steering vectors: 0 is a neutral text, 1 what strength 1 would do to it.

        With a reply, text is the user's message and the reply is what is measured.
        """
        return await call(lambda: session.read(text, vector, reply=reply))

    return server


def make_app(session: Session, *, tools: MCPServer[Any] | None = None) -> Starlette:
    """What passes requests on with the session's steering, and offers ``tools`` at ``/mcp``."""
    return passing(session, None if tools is None else tools.streamable_http_app())
