"""Every public function of three arguments or more says what each is."""

import ast
import re
from pathlib import Path

import pytest

import convexbn

PACKAGE = Path(convexbn.__file__).parent
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")


def documented(docstring):
    """Names in the Parameters section: ``name : type``, several before one type, or ``name`` alone."""
    section = re.search(r"Parameters\n *-{10}\n(.*?)(?:\n\n *\w[\w ]*\n *-{3,}|\Z)", docstring, re.DOTALL)
    if not section:
        return set()
    lines = [line for line in section[1].splitlines() if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    heads = [line.partition(" : ")[0] for line in lines if len(line) - len(line.lstrip()) == indent]
    return {name.strip(" *") for head in heads for name in head.split(",")}


def classes():
    """Names of the bases of every class, and the methods that each documents."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                found[node.name] = bases, methods
    return found


CLASSES = classes()


def inherited(name, bases):
    """Whether a base of ours has a method of the name, where it is described."""
    known = [CLASSES[base] for base in bases if base in CLASSES]
    return any(name in methods or inherited(name, further) for further, methods in known)


def public_functions(body, prefix=""):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = CLASSES[node.name][0]
            members = public_functions(node.body, f"{prefix}{node.name}.")
            yield from ((place, item) for place, item in members if not inherited(item.name, bases))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_describe_their_arguments(room):
    missing = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for place, node in public_functions(ast.parse(path.read_text()).body):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            names += [extra.arg for extra in (node.args.vararg, node.args.kwarg) if extra]
            left = set(names) - documented(ast.get_docstring(node) or "")
            if len(names) >= 3 and left:
                missing.append(f"{path.relative_to(PACKAGE)}: {place} does not describe {', '.join(sorted(left))}")
    assert not missing, "\n".join(missing)
