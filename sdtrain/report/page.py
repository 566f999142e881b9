"""A report rendered as Markdown and as one self-contained HTML page."""

import base64
import io

from jinja2 import Environment, PackageLoader
from PIL import Image

from sdtrain.report.section import Picture, Section, Table

TEMPLATE = "report.html.jinja"

TEXT_CELL = 40
"""A table cell with more characters than this is wrapped and left-aligned."""


def render_markdown(title: str, sections: list[Section]) -> str:
    """Return the report as Markdown; it links the pictures as NAME.png in its own folder."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += [*_table_lines(part), ""]
            elif isinstance(part, Picture):
                lines += [f"![{part.name}]({part.name}.png)", ""]
            else:
                lines += [_one_line_without_html(part), ""]
    return "\n".join(lines)


def render_html(title: str, sections: list[Section]) -> str:
    """Return the report as one HTML page that contains its pictures as data URLs."""
    environment = Environment(
        loader=PackageLoader("sdtrain.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["table"] = is_table
    environment.tests["picture"] = is_picture
    environment.filters["base64_png"] = base64_png
    template = environment.get_template(TEMPLATE)
    return template.render(title=title, sections=sections, text_cell=TEXT_CELL)


def base64_png(picture: Image.Image) -> str:
    """Return a picture as PNG in base64, as a data URL holds it."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def is_table(part: object) -> bool:
    """Tell the template whether a part of a section is a table."""
    return isinstance(part, Table)


def is_picture(part: object) -> bool:
    """Tell the template whether a part of a section is a picture."""
    return isinstance(part, Picture)


def _table_lines(table: Table) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are right-aligned."""
    alignment = ["---"] + ["---:"] * (len(table.heads) - 1)
    lines = []
    for cells in (table.heads, alignment, *table.rows):
        escaped = [_one_line_without_html(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return lines


def _one_line_without_html(text: str) -> str:
    """Join the lines of a text, and escape < so that it starts no HTML tag."""
    return " ".join(text.split()).replace("<", "&lt;")
