"""Code in a reply: found, looked at, and (only when asked) run in a child process with limits."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Sequence

_FENCE = re.compile(r"```[ \t]*[A-Za-z0-9_+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
SECONDS = 5
"""How long the code of one reply may run."""
MEGABYTES = 512
"""How much memory it may take, where the system can limit that (not on Windows)."""
_PASSED = 42

# Reads the code and the checks from files beside it. Code that ends the process by itself has not passed.
_RUNNER = f"""
import os, sys
try:
    import resource
    for what, most in (("CPU", {SECONDS}), ("AS", {MEGABYTES} << 20), ("FSIZE", 1 << 20), ("CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
        except (ValueError, OSError, AttributeError):
            pass
except ImportError:
    pass
space = {{"__name__": "reply"}}
try:
    exec(compile(open("reply.py", encoding="utf-8").read(), "reply.py", "exec"), space)
    for line in open("checks.txt", encoding="utf-8").read().splitlines():
        assert eval(line, space), line
except BaseException:
    os._exit(1)
os._exit({_PASSED})
"""


def without_fences(text: str) -> str:
    """The text outside of ``` blocks; an unclosed block goes to the end."""
    return _FENCE.sub(" ", text)


def find_code(reply: str, signature: str) -> str:
    """The code meant by a reply that was asked to complete ``def SIGNATURE:``.

    The first ``` block that defines the function, else the first block, else the whole reply. Lines of a body alone, with
    no ``def`` or ``class`` at their left edge, get their ``def``. Prose after unfenced code is left off.
    """
    name = signature.split("(")[0]
    blocks = [match[1] for match in _FENCE.finditer(reply)]
    defines = re.compile(rf"^[ \t]*def[ \t]+{re.escape(name)}\b", re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0] if blocks else reply)
    found = defines.search(code)
    if found is None and re.search(r"^(?:def|class)\b", code, re.MULTILINE):
        return code.strip("\n") + "\n"  # something else was defined
    if found is None:
        body = textwrap.indent(textwrap.dedent(code.strip("\n")), "    ")
        return f"def {signature}:\n{body}\n"
    if not blocks:
        code = _until_prose(code[found.start() :])
    return textwrap.dedent(code).strip("\n") + "\n"


def _until_prose(code: str) -> str:
    """From a ``def`` to the line where the text continues at the left edge with something that is not code."""
    lines = code.splitlines()
    for i, line in enumerate(lines[1:], start=1):
        if line and not line[0].isspace() and not re.match(r"(def|class|import|from|@|#)\b|[@#)\]}]", line):
            return "\n".join(lines[:i])
    return "\n".join(lines)


def defines(code: str, name: str) -> bool:
    """Whether the code is valid Python that defines a function of that name, with more in it than a docstring or pass."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return any(not _is_empty(statement) for statement in node.body)
    return False


def _is_empty(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def comment_density(code: str) -> float:
    """Comments for each line that is not blank; 0.0 for code that cannot be read."""
    lines = sum(bool(line.strip()) for line in code.splitlines())
    try:
        comments = sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return 0.0
    return comments / lines if lines else 0.0


def run_checks(code: str, checks: Sequence[str], *, seconds: float = SECONDS) -> bool:
    """Run ``code``, then see whether all ``checks`` (Python expressions) are true.

    In a child process with no environment, a temporary folder, no standard input and limits on time, memory and file
    size (POSIX; Windows: time alone). This is not a sandbox: the code can read the user's files and open connections.
    """
    with tempfile.TemporaryDirectory(prefix="steer-bench-", ignore_cleanup_errors=True) as folder:
        for name, text in (("reply.py", code), ("checks.txt", "\n".join(checks)), ("run.py", _RUNNER)):
            with open(os.path.join(folder, name), "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
        # Windows needs to find its own libraries
        environment = {key: os.environ[key] for key in ("SYSTEMROOT",) if key in os.environ}
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "run.py"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return child.wait(seconds) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child, and on POSIX what it has started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, 9)
        else:
            child.kill()
    except (ProcessLookupError, PermissionError):
        pass
    child.wait()
