"""A report as Markdown and as one self-contained HTML page."""

import base64
import io

from jinja2 import Environment, PackageLoader
from PIL import Image

from sdtrain.report.section import Picture, Section, Table

TEMPLATE = "report.html.jinja"

TEXT_CELL = 40
"""A cell with more characters than this is wrapped, and set to the left."""


def markdown(title: str, sections: list[Section]) -> str:
    """Pictures are named as NAME.png beside the file."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += [*_rows(part), ""]
            elif isinstance(part, Picture):
                lines += [f"![{part.name}]({part.name}.png)", ""]
            else:
                lines += [_plain(part), ""]
    return "\n".join(lines)


def page(title: str, sections: list[Section]) -> str:
    """HTML that needs nothing beside it: pictures lie in it as data."""
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
    """A picture as a data URL holds it."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def is_table(part: object) -> bool:
    """For the template."""
    return isinstance(part, Table)


def is_picture(part: object) -> bool:
    """For the template."""
    return isinstance(part, Picture)


def _rows(table: Table) -> list[str]:
    """The lines of a Markdown table; numbers are set to the right."""
    line_below = ["---"] + ["---:"] * (len(table.heads) - 1)
    rows = []
    for cells in (table.heads, line_below, *table.rows):
        escaped = [_plain(cell).replace("|", "\\|") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} |")
    return rows


def _plain(text: str) -> str:
    """On one line, and no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
