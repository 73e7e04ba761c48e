"""The ``steer`` command line: one module for each command."""
