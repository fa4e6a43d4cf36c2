"""What the site does beyond the Markdown of docs/: more pages, and file names that are links.

CONTRIBUTING.md, CHANGELOG.md and each notebook become pages, a notebook with the outputs that are
stored in it. Where a page names `docs/judge.md`, or a module as `gram_jax/rows.py`, the name is a
link, so that the same text reads well in the repository and on the site. Called by mkdocs
(mkdocs.yml).
"""

from __future__ import annotations

import base64
import functools
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_PAGE = re.compile(r"(?<!\[)`docs/([\w/]+)\.md`(?!\])")
_LINKED_FILE = re.compile(r"\[`?([\w./]+)`?\]\(\.\./([\w./]+)\)")
_MODULE = re.compile(r"(?<!\[)`(gram_jax(?:/\w+)+)\.py`(?!\])")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from other files."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            cells = json.loads(Path(file.abs_src_path or "").read_text("utf-8"))["cells"]
            for name, content in notebook_files(cells, posixpath.splitext(file.src_uri)[0]).items():
                files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the file names outside code blocks."""
    here = posixpath.dirname(page.file.src_uri)
    lines, in_code = [], False
    for line in markdown.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith("    "):
            line = _with_links(line, here, files)
        lines.append(line)
    return "\n".join(lines)


def _with_links(line: str, here: str, files: Files) -> str:
    def page_link(found: re.Match[str]) -> str:
        target = f"{found[1]}.md"
        file = files.get_file_from_path(target)
        if file is None:
            raise PluginError(f"docs/{target} is named, but there is no such page: {line.strip()}")
        title = file.content_string.partition("\n")[0].removeprefix("# ")
        return f"[{title}]({posixpath.relpath(target, here or '.')})"

    def module_link(path: str) -> str:
        name = path.removesuffix(".py").replace("/", ".")
        return f"[`{path}`][{name}]" if name in _documented() else f"`{path}`"

    line = _LINKED_FILE.sub(lambda found: module_link(found[2]), line)
    line = _PAGE.sub(page_link, line)
    return _MODULE.sub(lambda found: module_link(f"{found[1]}.py"), line)


@functools.cache
def _documented() -> frozenset[str]:
    """The modules that have a place in docs/api."""
    pages = (ROOT / "docs" / "api").glob("*.md")
    return frozenset(
        name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)
    )


def notebook_files(cells: list[dict[str, Any]], stem: str) -> dict[str, str | bytes]:
    """A notebook's page (STEM.md) and the images of its outputs, by their paths in docs/."""
    images: dict[str, str | bytes] = {}
    parts: list[str] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source + "\n")
            continue
        parts.append(f"```python\n{source}\n```\n")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(images) + 1}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![]({posixpath.basename(name)})\n")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```\n")
    title, _, rest = "\n".join(parts).partition("\n")
    name = posixpath.basename(stem) + ".ipynb"
    link = f"This page is a notebook: [{name}]({name})."
    return {f"{stem}.md": f"{title}\n\n{link}\n{rest}", **images}
