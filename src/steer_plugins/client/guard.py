"""Stands between a program and the server it starts, and ends the server when the program is gone, however it went.

Run as ``python guard.py SECONDS COMMAND...``: standard input is the program's pipe, and its end is the sign. Nothing else
works everywhere: a child learns of its parent's death on Linux only, and a killed parent cannot pass on a signal. A server that
does not end by itself within so many seconds is killed. Imports nothing of the package: it has to be small and to start at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(grace: float, command: list[str]) -> int:
    """Run the command until it or the program ends; returns its exit code, 128 + N after signal N."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", flush=True)
        return 127
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, lambda number, frame: end(child, grace))
    threading.Thread(target=watch, args=(child, grace), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def watch(child: subprocess.Popen[bytes], grace: float) -> None:
    """Wait for the end of standard input, then end the child."""
    try:
        while os.read(0, 64):
            pass
    except OSError:
        pass
    end(child, grace)


def end(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the child to end; when it does not, ask again, which llama-server takes for an order, and kill it in the end."""
    for seconds, act in ((grace / 4, child.terminate), (grace, child.kill)):
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()
    child.terminate()


if __name__ == "__main__":
    # not sys.exit: the watching thread may still wait for input
    code = main(float(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(code & 0xFF)
