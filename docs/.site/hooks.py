"""What the site needs beyond `docs/`: pages that stand at the root, files that pages point to, and a list of decisions.

The sources stay as GitHub shows them: a link goes to where a file is in the repository. Here each such link is turned to
the site's own copy, so that the site has everything it points to and asks no other server for it.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages that stand at the root of the repository, and what they are called here.
AT_THE_ROOT = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "README.md": "index.md",  # the start page says the same, longer
}
COPIES = "files"
LEFT_OUT = frozenset({"node_modules", "package-lock.json", "__pycache__", "dist"})

_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the lists of the navigation."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages at the root, and a copy of everything that a page points to."""
    for name, page in AT_THE_ROOT.items():
        if name != "README.md" and (ROOT / name).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    wanted = {
        target
        for file in files.documentation_pages()
        for target in _targets(_source(file))
        if not target.is_relative_to(DOCS) and target.name not in AT_THE_ROOT
    }
    inside = {path for target in wanted if target.is_dir() for path in _listed(target)}
    for path in sorted(wanted | inside):
        name = f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
        if path.is_dir():
            files.append(File.generated(config, f"{name}/index.md", content=_listing(path)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository to the site's copies."""
    _ = config, files
    if page.file.src_uri.startswith(f"{COPIES}/"):
        return markdown
    source = _source(page.file)

    def turned(found: re.Match[str]) -> str:
        target = _resolved(source, found[2])
        if target is None:
            return found[0]
        if target.is_relative_to(DOCS):
            place = target.relative_to(DOCS).as_posix()
        elif target.parent == ROOT and target.name in AT_THE_ROOT:
            place = AT_THE_ROOT[target.name]
        else:
            place = f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
        if target.is_dir():
            place += "/README.md" if (target / "README.md").is_file() else "/index.md"
        return found[1] + os.path.relpath(place, Path(page.file.src_uri).parent) + found[3]

    return _outside_of_code(markdown, lambda text: _LINK.sub(turned, text))


def _filled(nav: Any) -> Any:
    """The navigation with `folder/*.md` as a list of its pages."""
    if isinstance(nav, list):
        return [one for part in nav if (one := _filled(part)) is not None]
    if isinstance(nav, dict):
        ((title, value),) = nav.items()
        value = _filled(value)
        return None if value is None else {title: value}
    if "*" in nav:
        found = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.glob(nav))]
        if not found:
            raise PluginError(f"the navigation's {nav} finds no page")
        return found
    return nav


def _source(file: File) -> Path:
    """Where a page's text stands in the repository."""
    for name, page in AT_THE_ROOT.items():
        if file.src_uri == page and not (DOCS / page).is_file():
            return ROOT / name
    return DOCS / file.src_uri


def _targets(source: Path) -> Iterator[Path]:
    if source.is_file():
        text = source.read_text(encoding="utf-8")
        for part in _FENCE.split(text)[::2]:
            for found in _LINK.finditer(part):
                if target := _resolved(source, found[2]):
                    yield target


def _resolved(source: Path, link: str) -> Path | None:
    """What a link of a page names in the repository; None for an address elsewhere, or what is not there."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = (source.parent / link).resolve()
    return target if target.exists() and target.is_relative_to(ROOT) else None


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = _FENCE.split(markdown)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def _listed(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not LEFT_OUT & set(path.relative_to(folder).parts)
    ]


def _listing(folder: Path) -> str:
    """A page for a folder: what is in it."""
    rows = [
        f"- [{path.relative_to(folder)}]({path.relative_to(folder)})" for path in _listed(folder)
    ]
    return "\n".join([f"# `{folder.relative_to(ROOT)}`", "", *rows, ""])
