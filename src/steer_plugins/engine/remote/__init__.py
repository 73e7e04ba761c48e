"""The parts of :class:`~steer_plugins.engine.server.ServerEngine`: the connection, the vectors over there, the wire format."""
