"""README and site: every block runs as pasted, tables say what the code does, links lead somewhere, one repository."""

import importlib.util
import itertools
import re
import runpy
import tomllib
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import pytest

import rk_optax

pytestmark = pytest.mark.latest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHOOSE = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def load(path):
    """A script as a module, without running what it does as a program."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_python(paths):
    elsewhere = {"recipes", "physics", "extend"}  # test_recipes.py, test_extend.py
    long = {"forward-gradients", "games"}
    return [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in long else [])
        for p in paths
        if p.stem not in elsewhere and blocks(p, "python")
    ]


# --- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", with_python(PAGES))
def test_the_python_of_a_page_runs_as_pasted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


def test_the_commands_of_the_pages_name_files_and_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    assert any("rk-optax compare" in line for line in commands)
    for line in commands:
        for name in re.findall(r"(?:configs|benchmarks|docs/tools)/[\w./]+", line):
            assert (ROOT / name).exists(), line
        for names in re.findall(r"(?:\.|rk-optax)\[([\w,]+)\]", line):
            assert set(names.split(",")) <= set(extras), line
        for command in re.findall(r"rk-optax (\w+)", line):
            assert command in {"compare", "train", "race", "flow", "plot", "solvers"}, line


def test_the_readme_is_short_and_its_links_lead_to_files():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#\s]+)", README):
        assert "://" in target or (ROOT / target).is_file(), target


# --- How to choose ---------------------------------------------------------------------------------------------------


def test_every_answer_of_the_guide_points_to_a_row_or_a_section_that_is_there():
    tree = CHOOSE.split('<div class="tree"')[1].split("</div>")[0]
    anchors = set(re.findall(r'<a id="([\w-]+)">', RESULTS))
    anchors |= {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in RESULTS.splitlines()
        if line[:1] == "#"
    }
    linked = re.findall(r"results\.md#([\w-]+)", tree)
    assert len(set(linked)) >= 10
    assert set(linked) <= anchors
    assert {"L-BFGS", "Adam"} <= set(
        re.findall(r"L-BFGS|Adam", "".join(re.findall(r'<span class="take">(.*?)</span>', tree)))
    )
    assert {"poisson", "burgers", "gp-dual", "logistic", "digits-full-batch", "mnist-cost"} <= set(linked)


def rows_of(text, header):
    table = text.split(header)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_tableaus_is_that_of_the_tableaus():
    assert "{{ tableaus }}" in CHOOSE
    table = load(ROOT / "docs" / "tools" / "tableau_table.py").tableau_table()
    rows = rows_of(f"{table}\n\n", "| name | order | stages")
    assert [row[0] for row in rows] == list(rk_optax.TABLEAUS)
    rk4, dopri5, heun3 = (next(row for row in rows if row[0] == name) for name in ("rk4", "dopri5", "heun3"))
    assert rk4[1:] == ["4", "4", "4", "2.785", "0.70", "`rk_optax.rk4`"]
    assert dopri5[1:] == ["5(4)", "7", "6", "3.307", "0.55", "`rk_optax.dopri5`"]
    assert heun3[1:] == ["3", "3", "3", "2.513", "0.84", '`runge_kutta(…, "heun3")`']


LEAST_SQUARES = rk_optax.LeastSquares(lambda w: w - 1.0)
SOLVERS = {
    "explicit": ["euler", "heun", "ssprk3", "rk4", "dopri5"],
    "`rkc`, `rkl`": [rk_optax.Stabilized(name) for name in ("rkc1", "rkc2", "rkl1", "rkl2")],
    "`residual_euler`": [rk_optax.ResidualEuler()],
    "`rosenbrock_euler`": [rk_optax.RosenbrockEuler()],
    "`ros2`": [rk_optax.Ros2()],
    "implicit": ["backward_euler", "implicit_midpoint", "trapezoid", "sdirk2", "sdirk3", "radau3", "gauss4"],
    "`etd1`, `etdrk2`": [rk_optax.Etd(1), rk_optax.Etd(2)],
}
RULES = {
    "a number, a schedule": 0.1,
    "`dal(c)`": rk_optax.dal(0.1),
    '`dal(c, estimate="free")`': rk_optax.dal(0.1, estimate="free"),
    "`sgd_g2()`": rk_optax.sgd_g2(),
    "`error_control()`": rk_optax.error_control(),
    "`descent_control()`": rk_optax.descent_control(),
    "`trust_ratio_control()`": rk_optax.trust_ratio_control(),
    "`path_control()`": rk_optax.path_control(),
    "`line_search()`": rk_optax.line_search(),
}
# What a cell means that says neither yes nor no: which of the solvers of its column take the rule.
SOME = {
    "two stages or more": lambda solver: solver != "euler",
    "`euler`": lambda solver: solver == "euler",
    "with an embedded pair": lambda solver: rk_optax.TABLEAUS[solver].b_hat is not None,
    "order 2": lambda solver: solver.family in ("rkc2", "rkl2"),
    "`sdirk2`, `sdirk3`": lambda solver: solver in ("sdirk2", "sdirk3"),
    "`etdrk2`": lambda solver: solver.order == 2,
    "yes": lambda solver: True,
    "**default**": lambda solver: True,
    "no": lambda solver: False,
}
RULE_ROWS = rows_of(
    CHOOSE, "## Which solver takes which rule\n\nThe rule is what stands in the place of the learning rate.\n\n"
)


def test_the_table_of_rules_has_a_row_for_each_rule_and_a_column_for_each_kind_of_solver():
    header = CHOOSE.split("## Which solver takes which rule")[1].split("|---")[0]
    assert all(name in header for name in SOLVERS)
    assert [row[0] for row in RULE_ROWS] == list(RULES)


@pytest.mark.parametrize("row", RULE_ROWS, ids=lambda row: row[0].strip("`"))
def test_the_table_of_rules_says_what_can_be_built(row):
    name, *cells = row
    for cell, (column, solvers) in zip(cells, SOLVERS.items(), strict=True):
        for solver in solvers:
            try:
                rk_optax.runge_kutta(LEAST_SQUARES, RULES[name], solver)
                built = True
            except ValueError:
                built = False
            assert built == SOME[cell](solver), (name, column, solver)


def test_the_defaults_of_the_table_are_the_defaults():
    w = jnp.ones(2)
    for make, state in {
        rk_optax.rkc: "DescentControlState",
        rk_optax.ros2: "DescentControlState",
        rk_optax.residual_euler: "TrustRatioState",
        rk_optax.rosenbrock_euler: "TrustRatioState",
    }.items():
        assert type(make(LEAST_SQUARES).init(w).rule).__name__ == state


def test_the_questions_name_every_reason():
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    named = {row[0].strip("`") for row in rows_of(faq, "| reason | what happened")}
    assert named == {reason.name for reason in rk_optax.Reason if reason is not rk_optax.Reason.ACCEPTED}


# --- The repository's address, figures, the checker of links ---------------------------------------------------------


def test_all_files_name_the_repository_of_pyproject():
    assert load(ROOT / "docs" / "tools" / "repository.py").main(["--check"]) == 0


def test_a_fork_rewrites_every_place_and_nothing_else():
    rewritten = load(ROOT / "docs" / "tools" / "repository.py").rewritten
    colab = "https://colab.research.google.com/github/rk-optax/rk_optax/blob/main/notebooks/pinn.ipynb"
    text = f'({colab}) git+https://github.com/rk-optax/rk_optax" https://github.com/google/flax/blob/main/README.md'
    expected = text.replace("rk-optax/rk_optax", "someone/fork")
    assert rewritten(text, "someone/fork") == expected
    assert "google/flax" in expected


@pytest.mark.slow
def test_the_figures_are_those_that_can_be_drawn_and_every_method_has_its_own_look(tmp_path):
    mpl.use("agg")
    figures = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))
    committed = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert committed == set(figures["FIGURES_TO_DRAW"])
    looks = [look[1:] for look in figures["STYLES"].values()]
    same = {("sgd", "gradient_descent")}
    for (one, a), (other, b) in itertools.combinations(zip(figures["STYLES"], looks, strict=True), 2):
        assert a != b or (one, other) in same
    assert figures["draw"]("condition", tmp_path).stat().st_size > 10_000
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w-]+)\.png", page.read_text("utf-8"))}
    shown |= set(re.findall(r"figures/([\w-]+)\.png", RESULTS))
    assert shown == committed


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('<a href="b.html#there">b</a> <a href="https://example.org">c</a>', []),
        ('<a href="c.html">c</a>', ["a.html links to c.html, which is not there"]),
        ('<a href="b.html#nowhere">b</a>', ["a.html links to b.html#nowhere, and there is no such anchor"]),
        ('<script src="https://cdn.example.org/x.js"></script>', ["a.html fetches https://cdn.example.org/x.js"]),
    ],
)
def test_the_checker_of_the_site_finds_what_is_broken(body, found, tmp_path):
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1>')
    assert load(ROOT / "docs" / "tools" / "build.py").problems(tmp_path) == found
