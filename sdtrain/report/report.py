"""What sdtrain-report does: runs compared, drawn, written as one page."""

from rich.console import Console

from sdtrain.files import check_writable, write_text
from sdtrain.pictures import write_png
from sdtrain.report.compare import Comparison, compare
from sdtrain.report.configuration import configuration
from sdtrain.report.cost import cost
from sdtrain.report.levels import by_level, learning
from sdtrain.report.objectives import objectives, read_objectives
from sdtrain.report.page import markdown, page
from sdtrain.report.parting import where_they_part
from sdtrain.report.ranking import left_out, ranking, summary
from sdtrain.report.record import MeasuredRun, measure
from sdtrain.report.request import ReportRequest
from sdtrain.report.samples import drawn
from sdtrain.report.section import Picture, Section
from sdtrain.runs.layout import ReportFolder


def report(request: ReportRequest) -> None:
    """Writes the report, and prints its summary.

    Raises UserError where the baseline cannot be compared, StorageError where the folder cannot be
    written.
    """
    runs = measure(request.runs)
    comparison = compare(runs, request.baseline)
    output = request.output
    check_writable(output.path, "--output")
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of sdtrain"
    _write(title, make_sections(comparison, runs), output)
    console = Console(markup=False, highlight=False)
    for line in summary(comparison):
        console.print(line, soft_wrap=True)
    written = f"{output.page.name}, {output.text.name}"
    console.print(f"Written to {output.path}: {written}", soft_wrap=True)


def make_sections(comparison: Comparison, runs: list[MeasuredRun]) -> list[Section]:
    """Those that have something to show, in order."""
    sections = [ranking(comparison), left_out(comparison)]
    if comparison.arms:
        sections += [by_level(comparison), learning(comparison)]
    sections.append(objectives(read_objectives(comparison)))
    if comparison.arms:
        sections.append(drawn(comparison.arms))
    sections += [configuration(runs), cost(runs)]
    if len(runs) == 2:
        sections.append(where_they_part(*runs))
    return [section for section in sections if section.parts]


def _write(title: str, sections: list[Section], output: ReportFolder) -> None:
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                write_png(part.image, output.picture(part.name))
    write_text(output.text, markdown(title, sections))
    write_text(output.page, page(title, sections))
