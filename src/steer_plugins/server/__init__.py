"""Running a llama-server: :class:`ServerProcess` starts one, watches it and ends it."""

from steer_plugins.server.process import ServerProcess, free_port

__all__ = ["ServerProcess", "free_port"]
