"""Writes the repository's address, which stands in pyproject.toml, into the files that have to spell it out.

    python docs/tools/repository.py

For a fork: change the line in pyproject.toml, run this, commit. `--check` changes nothing and fails where one differs.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SLUG = r"[\w.-]+/[\w.-]+?"
# What comes before OWNER/NAME, and what after: a badge, a link to a file, raw data, an installation.
_PLACES = (
    (r"https://colab\.research\.google\.com/github/", r"/blob/"),
    (r"https://raw\.githubusercontent\.com/", r"/main/"),
    (r"git\+https://github\.com/", r"(?=[\"'\\\s`])"),
    (r"repository-code: \"https://github\.com/", r"\""),
)


def repository() -> str:
    """The address, without a slash at its end."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def spelt_out() -> list[Path]:
    """The files that name the repository."""
    return [ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def rewritten(text: str, slug: str) -> str:
    """The text with OWNER/NAME in every place where the repository is meant."""
    for before, after in _PLACES:
        text = re.sub(f"({before}){_SLUG}({after})", lambda match: f"{match[1]}{slug}{match[2]}", text)
    # Links to files of this repository; other projects' are left alone.
    return re.sub(
        rf"(https://github\.com/){_SLUG}(/blob/main/(?:RESULTS|notebooks|docs|rk_optax))", rf"\g<1>{slug}\g<2>", text
    )


def main(arguments: list[str]) -> int:
    """Rewrites, or checks; 0 where all agree."""
    slug = repository().removeprefix("https://github.com/")
    stale = []
    for path in spelt_out():
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, slug)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(path)
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
