"""What MkDocs does not do by itself: files of the repository as pages, the API's names, mathematics without a script.

- `{{ repository }}` in a page becomes the repository's address, which pyproject.toml holds.
- `{{ include FILE }}` becomes that file of the repository, with its links turned to pages of the site.
- `{{ names MODULE ... }}` becomes the documentation of all public names that live in these modules, and
  `{{ rest }}` that of the names which no page of the API names.
- `{{ tableaus }}` becomes the table of the named explicit methods.
- Notebooks become pages with their committed outputs; figures and raw results become files of the site.
- TeX between dollars becomes MathML, which browsers render by themselves.
"""

from __future__ import annotations

import base64
import functools
import html
import importlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tableau_table import tableau_table

ROOMS = ("rk_optax", "rk_optax.networks", "rk_optax.spectrum", "rk_optax.linen", "rk_optax.nnx")  # what users import
_NAMES = re.compile(r"\{\{ names ([\w. ]+) \}\}")
_FOLD = 9  # rows of a table above which the page of results folds it


def repository() -> str:
    """The one place that says where the project lives."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def notebooks() -> list[Path]:
    """All notebooks, those to begin with first."""
    first = ("quickstart", "which_solver", "pinn")
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return sorted(found, key=lambda path: first.index(path.stem) if path.stem in first else len(first))


@functools.cache  # reading docstrings imports more modules, and those must not change where a name is at home
def public_names() -> dict[str, str]:
    """Every public name, by its dotted path, and the module that defines it."""
    found: dict[str, str] = {}
    for room in ROOMS:
        if importlib.util.find_spec(room) is None:
            continue
        module = importlib.import_module(room)
        exported = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", None) == room
        ]
        for name in sorted(exported, key=str.lower):
            if not name.startswith("_"):
                found[f"{room}.{name}"] = _home(getattr(module, name), room, name)
    return found


def _home(value: Any, room: str, name: str) -> str:
    """The module where a name is defined; data have no `__module__`, so look for the module that holds the object."""
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and home.startswith("rk_optax"):
        return home
    for module_name, module in sorted(sys.modules.items(), key=lambda item: -len(item[0])):
        if module_name.startswith("rk_optax.") and vars(module).get(name) is value:
            return module_name
    return room


def names_of(modules: list[str]) -> list[str]:
    """Public names that live in these modules or below, the documented page order: classes after functions."""

    def belongs(home: str) -> bool:
        return any(home == module or home.startswith(module + ".") for module in modules)

    return [name for name, home in public_names().items() if belongs(home)]


def on_config(config: Any) -> Any:
    """The address of the repository, and the notebooks in the navigation."""
    config.repo_url = repository()
    config.repo_name = repository().removeprefix("https://")
    for entry in config.nav:
        if "Notebooks" in entry:
            entry["Notebooks"] = [f"notebooks/{path.stem}.md" for path in notebooks()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Notebooks, and the numbers behind the results."""
    for path in notebooks():
        text, images = _notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        files.append(File.generated(config, f"data/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the placeholders."""
    markdown = re.sub(r"\{\{ include ([\w./]+) \}\}", lambda match: _include(match[1]), markdown)
    markdown = _NAMES.sub(lambda match: _entries(names_of(match[1].split())), markdown)
    markdown = markdown.replace("{{ rest }}", _entries(_rest()))
    markdown = markdown.replace("{{ tableaus }}", tableau_table())
    return markdown.replace("{{ repository }}", repository())


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """TeX to MathML."""
    content = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), content, flags=re.S
    )
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _mathml(m[1], "block"), content, flags=re.S)


def _mathml(tex: str, display: str) -> str:
    return convert(html.unescape(tex).strip(), display=display)


def _entries(names: list[str]) -> str:
    return "\n\n".join(f"::: {name}" for name in names)


def _rest() -> list[str]:
    pages = (ROOT / "docs" / "api").glob("*.md")
    modules = [
        module for page in pages for match in _NAMES.findall(page.read_text("utf-8")) for module in match.split()
    ]
    return sorted(set(public_names()) - set(names_of(modules)), key=str.lower)


def _include(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    return _fold(site_links(text)) if name == "RESULTS.md" else site_links(text)


def site_links(text: str) -> str:
    """Links of a file at the top of the repository, as links of a page at the top of the site."""
    pages = {"README.md": "index.md", "RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md"}
    pages |= {"CONTRIBUTING.md": "contributing.md", "CITATION.cff": "citation.md"}

    def target(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        anchor = f"#{anchor}" if anchor else ""
        if not path or "://" in path:
            return match[0]
        if path in pages:
            return f"]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}{anchor})"
        if path.startswith("notebooks/") and path.endswith(".ipynb"):
            return f"]({path.removesuffix('.ipynb')}.md)"
        if path.startswith("benchmarks/results/") and path.endswith(".json"):
            return f"](data/{Path(path).name})"
        if not (ROOT / path).exists():
            raise ValueError(f"a link to {path}, which does not exist")
        return f"]({repository()}/blob/main/{path}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", target, text)


def _fold(text: str) -> str:
    """Long tables behind a line to click on."""

    def fold(match: re.Match[str]) -> str:
        table = match[0].strip("\n")
        rows = table.count("\n") - 1
        if rows < _FOLD or table.startswith("| claim"):
            return match[0]
        return f'\n<details markdown="1"><summary>the table, {rows} rows</summary>\n\n{table}\n\n</details>\n'

    return re.sub(r"\n(?:\|.*\n)+", fold, text)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A page of a notebook with its committed outputs, and its pictures."""
    notebook, parts, images = nbformat.read(path, as_version=4), [], {}
    colab = f"{repository().replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"\[!\[[^\]]+\]\([^)]+\)\]\(([^)]+)\)", r"[Open in Colab](\1)", cell.source)
            text = re.sub(re.escape(colab) + r"/notebooks/(\w+)\.ipynb(?=\))", lambda m: f"{m[1]}.md", text)
            text = text.replace(f"({path.stem}.md)", f"({colab}/notebooks/{path.name})")  # its own badge
            text = text.replace(f"({repository()}/blob/main/RESULTS.md)", "(../results.md)")
            parts.append(text)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for number, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{cell.execution_count}-{number}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure of the cell above]({name})")
            elif output.output_type == "stream" or "text/plain" in data:
                text = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images
