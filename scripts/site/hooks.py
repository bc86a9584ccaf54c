"""What mkdocs.yml needs beyond mkdocs: folders in the navigation, and links that leave docs/.

A page of docs/ may link to any file of the repository, as ../recipes/arithmetic.yaml. The site
has no address of the repository to send the reader to, so it carries those files itself, below
repository/: Markdown as pages, code as pages that show it, anything else as it is.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[2]
CODE = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".jinja": "jinja"}
STYLES = {"code-light.css": "default", "code-dark.css": "github-dark"}
_LINK = re.compile(r"(\]\()([^)#\s]+)")
_OUTSIDE = "repository/"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a folder's pages in the place of its name."""
    config.nav = [_unfold(entry, Path(config.docs_dir)) for entry in config.nav or []]
    return config


def _unfold(entry: Any, docs: Path) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {title: _pages(items, docs) for title, items in entry.items()}


def _pages(items: Any, docs: Path) -> Any:
    if not isinstance(items, list):
        return items
    pages = []
    for item in items:
        if isinstance(item, str) and item.endswith("/"):
            found = sorted((docs / item).glob("*.md"))
            pages += [page.relative_to(docs).as_posix() for page in found]
        else:
            pages.append(item)
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the colors of code, and the files of the repository that pages link to."""
    for name, style in STYLES.items():
        css = HtmlFormatter(style=style).get_style_defs(".highlight")
        files.append(File.generated(config, name, content=css))
    waiting = [_source(page) for page in files.documentation_pages()]
    waiting += [path for path in _of_nav(config.nav) if path]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(_outside(path, config))
        if path.endswith(".md"):
            linked = {found for _, found in _targets(path, (ROOT / path).read_text("utf-8"))}
            waiting += sorted(linked - seen)
            seen |= linked
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    for target, path in _targets(_source(page.file), markdown):
        new = posixpath.relpath(_place(path), posixpath.dirname(here) or ".")
        markdown = markdown.replace(f"]({target}", f"]({new}")
    return markdown


def _of_nav(nav: Any) -> Iterator[str]:
    """Yield the files outside docs/ that the navigation names."""
    if isinstance(nav, str):
        yield nav.removeprefix(_OUTSIDE) if nav.startswith(_OUTSIDE) else ""
    elif nav:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _of_nav(part)


def _source(file: File) -> str:
    """Return the path in the repository of what a page was made from."""
    uri = file.src_uri
    return uri.removeprefix(_OUTSIDE) if uri.startswith(_OUTSIDE) else f"docs/{uri}"


def _place(path: str) -> str:
    """Return where a file of the repository stands among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{_OUTSIDE}{path}{'.md' if Path(path).suffix in CODE else ''}"


def _targets(path: str, markdown: str) -> list[tuple[str, str]]:
    """Return a text's links to files that are there: as written, and from the repository's root."""
    found = []
    for _, target in set(_LINK.findall(markdown)):
        resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if "://" not in target and (ROOT / resolved).is_file():
            found.append((target, resolved))
    return sorted(found)


def _outside(path: str, config: MkDocsConfig) -> File:
    language = CODE.get(Path(path).suffix)
    if language is None:
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path))
    code = (ROOT / path).read_text("utf-8")
    content = f"# {path}\n\n~~~~~~{language}\n{code}\n~~~~~~\n"
    return File.generated(config, _place(path), content=content)
