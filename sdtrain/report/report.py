"""The work of sdtrain-report: compare runs, plot the result, and write it as one page."""

from rich.console import Console

from sdtrain.files import check_writable, write_text
from sdtrain.pictures import write_png
from sdtrain.report.compare import Comparison, compare
from sdtrain.report.configuration import configuration_section
from sdtrain.report.cost import cost_section
from sdtrain.report.levels import error_by_level_section, learning_curves_section
from sdtrain.report.loss_difference import loss_difference_section
from sdtrain.report.objectives import build_objectives, objectives_section
from sdtrain.report.page import render_html, render_markdown
from sdtrain.report.ranking import left_out_section, ranking_section, summary_lines
from sdtrain.report.record import MeasuredRun, read_validations
from sdtrain.report.request import ReportRequest
from sdtrain.report.samples import samples_section
from sdtrain.report.section import Picture, Section
from sdtrain.runs.layout import ReportFolder


def write_report(request: ReportRequest) -> None:
    """Write the report and print its summary.

    Raises UserError if the baseline cannot be compared, StorageError if the folder cannot be
    written to.
    """
    runs = read_validations(request.runs)
    comparison = compare(runs, request.baseline)
    output = request.output
    check_writable(output.path, "--output")
    title = f"Comparison of {len(runs)} sdtrain run{'s' if len(runs) > 1 else ''}"
    _write_files(title, make_sections(comparison, runs), output)
    console = Console(markup=False, highlight=False)
    for line in summary_lines(comparison):
        console.print(line, soft_wrap=True)
    written = f"{output.page.name}, {output.text.name}"
    console.print(f"Written to {output.path}: {written}", soft_wrap=True)


def make_sections(comparison: Comparison, runs: list[MeasuredRun]) -> list[Section]:
    """Return the sections that have something to show, in order."""
    sections = [ranking_section(comparison), left_out_section(comparison)]
    if comparison.arms:
        sections += [error_by_level_section(comparison), learning_curves_section(comparison)]
    sections.append(objectives_section(build_objectives(comparison)))
    if comparison.arms:
        sections.append(samples_section(comparison.arms))
    sections += [configuration_section(runs), cost_section(runs)]
    if len(runs) == 2:
        sections.append(loss_difference_section(*runs))
    return [section for section in sections if section.parts]


def _write_files(title: str, sections: list[Section], output: ReportFolder) -> None:
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                write_png(part.image, output.picture(part.name))
    write_text(output.text, render_markdown(title, sections))
    write_text(output.page, render_html(title, sections))
