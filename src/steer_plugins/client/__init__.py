"""Everything that talks to a llama-server with steering: the engine over HTTP, and a server as a watched child process."""

from .facts import ServerFacts
from .process import ServerProcess, free_port, port_taken

__all__ = ["ServerFacts", "ServerProcess", "free_port", "port_taken"]
