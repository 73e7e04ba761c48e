"""Everything that talks to a llama-server with steering: the engine over HTTP, and a server as a watched child process."""

from .connection import is_loopback
from .facts import ServerFacts
from .process import ServerProcess, free_port, port_taken

__all__ = ["ServerFacts", "ServerProcess", "free_port", "is_loopback", "port_taken"]
