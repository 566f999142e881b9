"""The command sdtrain-report: compare runs."""

import argparse
from pathlib import Path

from sdtrain.config.boundary import error_boundary
from sdtrain.console import secure_streams

HELP = """\
Compare runs. Each FOLDER is a run or a sweep. Writes report.html and report.md
with their plots.

Runs are ranked by validation/bits_per_dim over the noise levels that all of
them reach. Differences between runs are paired: they are taken on the same
validation pictures.
"""


def main() -> None:
    secure_streams()
    parser = argparse.ArgumentParser(
        "sdtrain-report", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--baseline", metavar="NAME", help="run to compare the others with (default: the first)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: report/ in the first folder)",
    )
    arguments = parser.parse_args()
    with error_boundary("train", "--output"):
        from sdtrain.report.request import read_request

        request = read_request(arguments.folders, arguments.baseline, arguments.output)
        from sdtrain.report.report import write_report

        write_report(request)


if __name__ == "__main__":
    main()
