"""sdtrain-report: compares runs."""

import argparse
from pathlib import Path

from sdtrain.config.boundary import error_boundary
from sdtrain.console import secure_streams

HELP = """\
Compares the runs in the folders, each a run or a sweep, and writes report.html, report.md and
their plots. Runs are ranked by validation/bits_per_dim on the noise levels that all of them reach;
differences are taken picture by picture.
"""


def main() -> None:
    secure_streams()
    parser = argparse.ArgumentParser(
        "sdtrain-report", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the run that others are compared with (the first)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (report/ in the first folder)"
    )
    asked = parser.parse_args()
    with error_boundary("train", "--output"):
        from sdtrain.report.request import read_request

        request = read_request(asked.folders, asked.baseline, asked.output)
        from sdtrain.report.report import write_report

        write_report(request)


if __name__ == "__main__":
    main()
