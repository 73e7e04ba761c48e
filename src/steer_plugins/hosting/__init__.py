"""What stands between a program and its model: a passing server, a session that a model steers, DwarfStar 4's own server."""
