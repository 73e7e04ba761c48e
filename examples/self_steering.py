"""An agent that notices it rambles: it reads how wordy its own replies are and turns its succinctness up, with the tools of
`steer mcp`, as any client of the Model Context Protocol can.

    steer train succinctness
    steer serve &
    steer mcp --server http://127.0.0.1:8080 --http --allow succinctness:1 &
    python examples/self_steering.py http://127.0.0.1:8090 "What does DNS do?" "Why do databases use indexes?" "What is rain?"

A model that calls tools can do all this by itself: offer it the same tools. Here a rule stands in its place, so that it works
with a small model as well: one that is asked for its opinion of itself says what it pleases, a measurement does not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import anyio
import httpx
from mcp import Client


@dataclass
class Agent:
    """Answers questions one after another, and keeps its replies short.

    Args:
        url: where `steer mcp --http` listens.
        vector: the vector that makes replies terser.
        words: from how many words on a reply rambles.
        step: how much stronger it steers after each that does, up to what it may set.
    """

    url: str
    vector: str = "succinctness"
    words: int = 60
    step: float = 0.4
    strength: float = 0.0
    history: list[tuple[float, int, float]] = field(default_factory=list)
    """(strength, words, projection on the vector) of each reply."""

    async def answer(self, question: str) -> str:
        """The reply to a question; what was learnt from it acts on the next one."""
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 160, "temperature": 0}
        async with httpx.AsyncClient(timeout=600) as http:
            found = await http.post(f"{self.url}/v1/chat/completions", json=body)
        found.raise_for_status()
        reply = str(found.json()["choices"][0]["message"]["content"])
        async with Client(f"{self.url}/mcp") as tools:
            await self._reflect(tools, question, reply)
        return reply

    async def _reflect(self, tools: Client, question: str, reply: str) -> None:
        arguments = {"text": question, "reply": reply, "vector": self.vector}
        read = await tools.call_tool("read_projection", arguments)
        n_words = len(reply.split())
        leaning = float((read.structured_content or {})["projections"][self.vector])
        self.history.append((self.strength, n_words, leaning))
        if n_words <= self.words:
            return
        told = await tools.call_tool("set_steering", {"steering": f"{self.vector}:{self.strength + self.step:g}"})
        if not told.is_error:  # else it is as strong as it may be
            self.strength += self.step


async def main(url: str, questions: list[str]) -> None:
    agent = Agent(url)
    for question in questions:
        reply = await agent.answer(question)
        strength, n_words, leaning = agent.history[-1]
        print(f"\n> {question}   [{agent.vector} {strength:g}: {n_words} words, projection {leaning:+.2f}]\n{reply}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1].rstrip("/"), sys.argv[2:])
