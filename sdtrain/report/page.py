"""A report as Markdown and as one self-contained HTML page."""

import base64
import html
from dataclasses import dataclass, field

from PIL import Image

from sdtrain.report.figures import png

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 1rem; color: #1e1e1e; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; height: auto; display: block }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
@media (max-width: 700px) { img { max-width: none; width: 680px } }
td.text { white-space: normal; text-align: left; min-width: 14rem } .note { color: #555 }
"""


@dataclass
class Table:
    heads: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """title; parts in order: text, a Table, or (name, picture)."""

    title: str
    parts: list[str | Table | tuple[str, Image.Image]] = field(default_factory=list)


def markdown(title: str, sections: list[Section]) -> str:
    """Pictures are named as NAME.png beside the file."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                cells = [part.heads, ["---"] + ["---:"] * (len(part.heads) - 1), *part.rows]
                lines += [
                    "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |"
                    for row in cells
                ] + [""]
            elif isinstance(part, tuple):
                lines += [f"![{part[0]}]({part[0]}.png)", ""]
            else:
                lines += [_plain(part), ""]
    return "\n".join(lines)


def page(title: str, sections: list[Section]) -> str:
    """HTML that needs nothing beside it: pictures lie in it as data."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.heads)
                rows = "".join(
                    "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in part.rows
                )
                body.append(
                    f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
                )
            elif isinstance(part, tuple):
                data = base64.b64encode(png(part[1])).decode()
                body.append(
                    f'<div class="wide"><img alt="{html.escape(part[0])}" src="data:image/png;base64,{data}"></div>'
                )
            else:
                body.append(f'<p class="note">{html.escape(part)}</p>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _plain(text: str) -> str:
    """On one line, and no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return (
        f'<td class="text">{html.escape(text)}</td>'
        if len(text) > 40
        else f"<td>{html.escape(text)}</td>"
    )
