"""How the modules lie: none imports from further up in CONTRIBUTING's table, none is in a circle, none is long."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.latest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rk_optax").rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def statements(body):
    """Those that run at import: functions and what type checkers alone see are left out."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from statements(node.body)
        else:
            yield node


def imported(path):
    """The modules of the package that a file imports, less the package itself, of whose names all may speak."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found & (MODULES.keys() - {"rk_optax", name_of(path)})


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def places():
    """The row of the table in which a module, or the room that it is in, stands."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The modules")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `rk_optax/")]
    names = [re.findall(r"`(?:rk_optax/)?(\w+)(?:\.py|/)`", row) for row in rows]
    row_of = {f"rk_optax.{name}": place for place, row in enumerate(names) for name in row}
    return {name: row_of.get(".".join(name.split(".")[:2])) for name in MODULES}


def test_modules_import_from_further_down_alone():
    place = places()
    assert len({p for p in place.values() if p is not None}) > 10
    for name, others in IMPORTS.items():
        for other in others:
            if None not in (place[name], place[other]):
                assert place[name] <= place[other], f"{name} imports {other}, which is further up in CONTRIBUTING.md"


def test_no_imports_go_round_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_no_module_is_longer_than_450_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.__getitem__)
