"""Builds the site with warnings as errors and checks it: links, anchors, nothing from elsewhere, no name missing.

    python docs/tools/build.py

The site is then in build/site; `python -m http.server -d build/site` shows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

TOOLS = Path(__file__).parent
ROOT = TOOLS.parents[1]
SITE = ROOT / "build" / "site"
sys.path.insert(0, str(TOOLS))


class Page(HTMLParser):
    """The ids of a page, where it links to, and what a browser would fetch to show it."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Reads one tag."""
        of = {name: value for name, value in attributes if value}
        self.ids |= {of[name] for name in ("id", "name") if name in of}
        if "href" in of and tag in ("a", "link"):
            self.links.append(of["href"])
        if "src" in of:
            self.links.append(of["src"])
            self.fetched.append(of["src"])
        if tag == "link" and "stylesheet" in of.get("rel", "") and "href" in of:
            self.fetched.append(of["href"])


def problems(site: Path) -> list[str]:
    """What is wrong with a built site, one sentence each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where} fetches {url}" for url in page.fetched if url.startswith(("http:", "https:", "//"))]
        if path.name == "404.html":
            continue  # shown at any address, so its links start at the root
        for link in set(page.links):
            if link.startswith(("http:", "https:", "mailto:", "data:", "javascript:")):
                continue
            address, anchor = urldefrag(urljoin(path.as_uri(), link))
            target = Path(unquote(address.removeprefix("file://")))
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{where} links to {link}, which is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                found.append(f"{where} links to {link}, and there is no such anchor")
    return found


def undocumented(site: Path) -> list[str]:
    """Public names without an entry in the API reference."""
    from hooks import public_names

    ids = set().union(*(Page(path.read_text(encoding="utf-8")).ids for path in (site / "api").glob("*.html")))
    return [f"{name} is nowhere in the API reference" for name in public_names() if name not in ids]


def main() -> int:
    """Builds and checks; 0 where all is well."""
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        return 1
    found = problems(SITE) + undocumented(SITE)
    print("\n".join(found) or f"{len(list(SITE.rglob('*.html')))} pages, no broken link, no name undocumented")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
