"""Write the tables of fields in docs/http-protocol.md from cpp_patch/server-steer-fields.h, where they are declared.

python scripts/protocol.py            write them
python scripts/protocol.py --check    say whether they are up to date; exit code 1 if not
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "cpp_patch" / "server-steer-fields.h"
PAGE = ROOT / "docs" / "http-protocol.md"
_STRING = r'"((?:[^"\\]|\\.)*)"'
_FIELD = re.compile(
    rf"^\s*\{{ {_STRING},\s*{_STRING},\s*{_STRING},\s*([^,]+),\s*([^,]+),\s*{_STRING},\s*{_STRING} \}},$", re.MULTILINE
)
_BLOCK = re.compile(r"<!-- fields: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_NAMED = {"LLAMA_STEER_MAX_OVER": "4096"}


def tables() -> dict[str, str]:
    """The Markdown table of each object."""
    rows: dict[str, list[str]] = {}
    text = HEADER.read_text(encoding="utf-8")
    for object_, name, kind, least, most, fallback, meaning in _FIELD.findall(text):
        meaning, fallback = (re.sub(r"\\(.)", r"\1", s) for s in (meaning, fallback))
        rows.setdefault(object_, []).append(
            f"| `{name}` | {_type(kind, least.strip(), most.strip())} | {fallback or 'required'} | {meaning} |"
        )
    found, declared = sum(map(len, rows.values())), len(re.findall(r'^\s*\{ "', text, re.MULTILINE))
    if found != declared:
        sys.exit(f"{declared - found} fields of {HEADER.name} are not written on one line each")
    head = "| field | type | left out | meaning |\n|---|---|---|---|\n"
    return {object_: head + "\n".join(lines) + "\n" for object_, lines in rows.items()}


def _type(kind: str, least: str, most: str) -> str:
    least, most = _NAMED.get(least, least), _NAMED.get(most, most)
    if "number" in kind:
        return f"{kind}, {least} to {most}"
    if kind.startswith("list"):
        return f"{kind}, at most {most}"
    return kind


def page() -> str:
    """The page with its tables as they should be."""
    made = tables()
    text = PAGE.read_text(encoding="utf-8")
    shown = _BLOCK.findall(text)
    if sorted(shown) != sorted(made):
        sys.exit(f"{PAGE.name} shows the fields of {sorted(shown)}, declared are {sorted(made)}")
    return _BLOCK.sub(lambda m: f"<!-- fields: {m[1]} -->\n{made[m[1]]}<!-- end -->", text)


def main() -> int:
    """Run it from the command line."""
    wanted = page()
    if sys.argv[1:] == ["--check"]:
        same = PAGE.read_text(encoding="utf-8") == wanted
        if not same:
            print(f"{PAGE.name} is out of date: run scripts/protocol.py", file=sys.stderr)
        return 0 if same else 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
