"""Everything that talks to a llama-server with steering: the engine over HTTP, and a server as a watched child process."""

from .process import ServerProcess, free_port

__all__ = ["ServerProcess", "free_port"]
