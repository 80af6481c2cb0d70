"""Every notebook runs, opens in Colab from its own path, and is committed with small and clean outputs."""

import json
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.latest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SLUG = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = re.compile(
    r"\[!\[[^\]]+\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
    rf"\(https://colab\.research\.google\.com/github/{re.escape(SLUG)}/blob/main/([^)]+)\)"
)
INSTALL = f"""\
try:
    import rk_optax
except ImportError:
    %pip install -q "rk-optax[experiment] @ git+https://github.com/{SLUG}"
    import rk_optax"""
MACHINE_PATH = re.compile(r"(?<![\w.:/])(/(home|root|Users|tmp|var|opt|usr|work|mnt|content|private)/|[A-Z]:\\\\?\w)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_the_first_cell_has_a_title_and_a_badge_to_the_notebook_itself(path, notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert BADGE.findall(first.source) == [path.relative_to(ROOT).as_posix()]


def test_links_between_notebooks_lead_somewhere(notebook):
    for cell in notebook.cells:
        for target in re.findall(rf"github(?:\.com)?/{re.escape(SLUG)}/blob/main/([^)\s]+)", cell.source):
            assert (ROOT / target).is_file()


def test_the_first_code_cell_installs_the_package_where_it_is_missing(notebook):
    assert code_cells(notebook)[0].source == INSTALL


def test_only_the_first_code_cell_installs_anything(notebook):
    assert not any(re.search(r"pip3? install", cell.source) for cell in code_cells(notebook)[1:])


def test_committed_outputs_come_from_one_run_in_order_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "Traceback" not in json.dumps(output)


def test_small(path):
    assert path.stat().st_size < 400_000


def test_no_trace_of_a_machine(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert "execution" not in cell.metadata  # the times at which it ran
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            # Base64 may spell anything.
            texts.extend(text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))
        for text in texts:
            assert not MACHINE_PATH.search(text)


def test_the_numbers_of_the_mnist_study_in_its_notebook_are_those_of_the_results():
    path = ROOT / "notebooks" / "learning_by_solving_differential_equations.ipynb"
    (cell,) = (cell for cell in code_cells(nbformat.read(path, as_version=4)) if "NUMBERS" in cell.source)
    load = runpy.run_path(str(ROOT / "benchmarks" / "image_studies.py"))["load"]
    lines = cell.source.split('"""')[1].strip().splitlines()
    assert len(lines) == 14
    for line in lines:
        equal, name, *numbers = line.split()
        expected = []
        for size in (16, 64, 1024, 8192):
            (row,) = (r for r in load("mnist", size)["table"] if (r["equal"], r["optimizer"]) == (equal, name))
            expected += [f"{100 * row['test_accuracy'][key]:.3f}" for key in ("mean", "min", "max")]
        assert numbers == expected, line


@pytest.mark.parametrize("text", ["/home/me/x.py", "in /tmp/a", "File '/usr/lib/x'", r"C:\Users\me", "(/content/a)"])
def test_machine_paths_are_found(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://github.com/home/x", "h / 2", "a/tmp/b", "steps/usr", "T:\n", r"\theta"])
def test_nothing_else_is_taken_for_a_machine_path(text):
    assert not MACHINE_PATH.search(text)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel installs, and nothing else of the repository."""
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["rk_optax"]
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "rk_optax", folder / "rk_optax", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_runs_in_an_empty_folder_with_the_installed_package_alone(notebook, installed, tmp_path, monkeypatch):
    monkeypatch.setenv("RK_OPTAX_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    check = f"import rk_optax\nassert rk_optax.__file__.startswith({str(installed)!r}), rk_optax.__file__"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    # The kernel is this interpreter and reads nobody's settings; conftest's eight devices are not for it.
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
