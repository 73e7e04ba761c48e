"""Write docs/python-api.md from the docstrings of ``steer_plugins.__all__``:  python scripts/python_api.py docs/python-api.md

The sources are read and not imported: the page does not depend on what is installed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
Definition = ast.ClassDef | ast.FunctionDef

GROUPS = {
    "Engines": ("Engine", "LocalEngine", "ServerEngine", "SteeredLlama", "ServerProcess"),
    "What is asked and answered": ("GenerateRequest", "Generation", "Activations"),
    "Vectors": ("SteeringVector", "ModelIdentity", "Library", "read_vector", "write_vector"),
    "Steering": ("Steering", "Term", "Schedule", "Gate"),
    "Several vectors together": ("combine", "dose", "cap_dose", "correlations", "orthogonalise"),
    "In the middle of a layer": ("ReadRows", "AddTokens"),
    "Errors": ("SteerError",),
}
HEAD = """# Python

<!-- made from the docstrings by ./scripts/docs: change those -->

Everything here is imported from `steer_plugins`.
A name is loaded when it is first used, so `import steer_plugins` costs little.
The words are explained in [architecture](architecture.md#words), the text form of a steering in [grammar](grammar.md).
"""


def parse(module: str) -> ast.Module:
    """The source of a module or package."""
    path = SOURCE / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def homes() -> dict[str, str]:
    """``steer_plugins._HOMES``: each public name and the module it is in."""
    for node in parse("steer_plugins").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOMES":
            return ast.literal_eval(node.value)
    raise LookupError("_HOMES")


def definition(module: str, name: str) -> Definition:
    """Where ``name`` is defined, also when ``module`` only passes it on."""
    for node in parse(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.level == 1 and any(alias.name == name for alias in node.names):
            package = module if (SOURCE / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
            return definition(f"{package}.{node.module}", name)
    raise LookupError(f"{module} has no {name}")


def fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    """Public annotated names of a class: what a dataclass is made with."""
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_"):
            yield one


def functions(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Methods of a class, in their order."""
    return [one for one in node.body if isinstance(one, ast.FunctionDef)]


def signature(node: Definition, name: str) -> str:
    """As one would call it; for a dataclass its fields."""
    if isinstance(node, ast.ClassDef):
        makers = [one for one in functions(node) if one.name == "__init__"]
        if not makers:
            return f"{name}({', '.join(ast.unparse(one) for one in fields(node))})"
        node = makers[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"{name}({re.sub(r'^(self|cls)(, |$)', '', ast.unparse(node.args))}){returns}"


def markdown(text: str) -> str:
    """A docstring's marks and its sections (``Raises:``) as Markdown."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", cleandoc(text)).replace("``", "`")
    out: list[str] = []
    section = code = False
    for line in text.split("\n"):
        is_code = line.startswith((">>> ", "... "))
        if is_code != code and (is_code or not line):
            out.append("```python" if is_code else "```")
            code = is_code
        section = bool(re.fullmatch(r"(Args|Attributes|Raises|Returns|Warns|Yields):", line)) or (
            section and line.startswith("    ")
        )
        found = re.fullmatch(r"    (\*{0,2}[\w., ]+): (.*)", line) if section else None
        if found:
            line = f"- `{found[1]}`: {found[2]}"
        elif section and line.startswith("    "):
            line = "  " + line.strip()
        elif section:
            line = f"{line}\n"
        out.append(line)
    return "\n".join([*out, "```"] if code else out)


def entry(node: Definition, level: str, prefix: str = "") -> Iterator[str]:
    """Heading, signature and docstring, and for a class its public methods."""
    marks = {ast.unparse(one).split("(")[0] for one in node.decorator_list}
    yield f"{level} `{prefix}{node.name}`"
    called = isinstance(node, ast.FunctionDef) or "dataclass" in marks or any(one.name == "__init__" for one in functions(node))
    if called and "property" not in marks:
        yield f"```python\n{signature(node, prefix + node.name)}\n```"
    yield markdown(ast.get_docstring(node, clean=False) or "")
    if isinstance(node, ast.ClassDef):
        for one in functions(node):
            if not one.name.startswith("_") and ast.get_docstring(one):
                yield from entry(one, level + "#", f"{node.name}.")


def render() -> str:
    """The whole page. Raises LookupError when a public name is in no group."""
    known = homes()
    parts = [HEAD]
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            parts += entry(definition(known.pop(name), name), "###")
    if known:
        raise LookupError(f"in no group of scripts/python_api.py: {', '.join(known)}")
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
