"""report.html: a page that explains a run to someone who was not there, complete in one file.

Prose, tables and figures stand in the file itself: it opens without a network, from a mail or a
bucket, and looks the same in ten years. `Table` prints the same rows on a console, in Markdown and
in HTML.
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None

NOTHING = "\N{EN DASH}"

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?\d[\d.,]*\s?[%A-Za-z]{0,3}(\s?[\[(].*[\])])?")


class Table:
    """Headers and rows, written to a console, to Markdown and to HTML.

    None is written as a dash, a float with three decimals; format a cell as a string
    for anything else.
    Columns that hold only numbers ("71.2%", "1.23M" and "0.71 [0.68, 0.74]" too) are aligned to the
    right.
    """

    def __init__(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Raises ValueError, naming the row, where a row has not one cell per header."""
        self.headers = list(headers)
        self.rows: list[list[str]] = []
        for number, row in enumerate(rows):
            if len(row) != len(self.headers):
                raise ValueError(
                    f"row {number} has {len(row)} cells for {len(self.headers)} headers: {row!r}"
                )
            self.rows.append([_cell_text(cell) for cell in row])
        self.numeric = [
            any(row[column] != NOTHING for row in self.rows)
            and all(row[column] == NOTHING or _NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(self.headers))
        ]

    def text(self) -> str:
        """Aligned with spaces, a rule under the headers, no newline at the end."""
        cells = [[" ".join(cell.split()) for cell in row] for row in (self.headers, *self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.headers))]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self.numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, no newline at the end."""
        rule = ["---:" if right else "---" for right in self.numeric]
        rows = [[_markdown_cell(cell) for cell in row] for row in (self.headers, *self.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))

    def html(self, caption: str = "") -> str:
        """A <table> element; headers and cells are escaped."""
        head = "".join(
            f'<th scope="col"{self._right(column)}>{html.escape(header)}</th>'
            for column, header in enumerate(self.headers)
        )
        body = "\n".join(
            "<tr>"
            + "".join(
                f"<td{self._right(column)}>{html.escape(cell)}</td>"
                for column, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        title = f"<caption>{_inline(caption)}</caption>\n" if caption else ""
        return (
            f"<table>\n{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        )

    def _right(self, column: int) -> str:
        return ' class="number"' if self.numeric[column] else ""

    def __str__(self) -> str:
        return self.text()


class Report:
    """A page built from top to bottom: each call appends, `save` writes it all."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._figures = 0

    def section(self, heading: str, prose: str = "") -> None:
        """A heading and paragraphs of plain text; a blank line parts paragraphs, `backticks` mark
        code.
        """
        self._parts.append(f"<h2>{_inline(heading)}</h2>")
        for paragraph in re.split(r"\n\s*\n", prose.strip()):
            if paragraph:
                self._parts.append(f"<p>{_inline(paragraph)}</p>")

    def table(self, table: Table, caption: str = "") -> None:
        # Its own scroller: a wide table must not make the whole page wider than a phone.
        self._parts.append(f'<div class="scroll">\n{table.html(caption)}\n</div>')

    def figure(self, figure: Figure, caption: str, alt: str) -> None:
        """A Matplotlib figure as inline SVG; `alt` says what it shows to who cannot see it."""
        if not alt.strip():
            raise ValueError("a figure needs alt text: say in a sentence what it shows")
        self._figures += 1
        svg = _inline_svg(figure, prefix=f"figure{self._figures}-", label=alt)
        self._parts.append(
            f'<figure>\n<div class="card">\n{svg}\n</div>\n'
            f"<figcaption>{_inline(caption)}</figcaption>\n</figure>"
        )

    def code(self, text: str) -> None:
        """Text in its own lines, such as a command or an example."""
        self._parts.append(f"<pre><code>{html.escape(text.strip(chr(10)))}</code></pre>")

    def html(self) -> str:
        """The whole page."""
        subtitle = f'<p class="subtitle">{_inline(self.subtitle)}</p>\n' if self.subtitle else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            "<body>\n<main>\n"
            f"<header>\n<h1>{html.escape(self.title)}</h1>\n{subtitle}</header>\n"
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, through a temporary file so that a reader never sees half of it; returns
        its path.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(self.html(), encoding="utf-8")
        temporary.replace(target)
        return target


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return NOTHING
    if not isinstance(cell, float):
        return str(cell)
    # Three decimals line up in a column; a value they would show as zero is written out.
    return f"{cell:.3f}" if cell == 0 or 5e-4 <= abs(cell) < 1e6 else f"{cell:.3g}"


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")


def _inline(text: str) -> str:
    """Escaped text, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip()))


def _inline_svg(figure: Figure, *, prefix: str, label: str) -> str:
    """The figure as an <svg> element fit to stand in a page beside others.

    Matplotlib writes a file of its own: an XML header, metadata with addresses, a size in points,
    and ids that repeat from figure to figure. In a page the first three go, and ids get a prefix of
    their own.
    """
    import matplotlib

    buffer = io.StringIO()
    # Ids are hashed with this salt, by default a random one, which would make each page differ.
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}")
    opening, rest = svg.split(">", maxsplit=1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{html.escape(label.strip())}">{rest}'


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d5dae0;
  --paper: #ffffff; --shade: #f4f6f8; --card: #fdfdfc; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e3e6ea; --soft: #a2abb6; --line: #3b424b;
  --paper: #15181c; --shade: #20252b; --card: #f3f4f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { max-width: 840px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 .6rem; }
p { margin: 0 0 1rem; overflow-wrap: break-word; }
.subtitle { color: var(--soft); font-size: 1.05rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption, figcaption { color: var(--soft); font-size: .88rem; line-height: 1.45; text-align: left; }
caption { padding-bottom: .5rem; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { padding-left: .2rem; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.4rem 0 1.8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem; }
.card svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; }
code { font: .88em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--shade); border-radius: 4px; padding: .1em .3em; overflow-wrap: anywhere; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; margin: 1rem 0 1.4rem; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
@media print { .card, pre { break-inside: avoid; } h2 { break-after: avoid; } }
"""
