"""sdtrain-report: compares runs."""

import argparse
import sys
from pathlib import Path

HELP = """\
Compares the runs in the folders, each a run or a sweep, and writes report.html, report.md and their plots. Runs are ranked by
validation/bits_per_dim on the noise levels that all of them reach; differences are taken picture by picture.
"""


def main() -> None:
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
    from sdtrain.console import fail
    from sdtrain.errors import UserError
    from sdtrain.report.report import report

    try:
        report(asked.folders, asked.baseline, asked.output or asked.folders[0] / "report")
    except UserError as error:
        fail(error.exit_code, " ".join(str(error).split()))
    except OSError as error:
        fail(5, f"{error.strerror}: {error.filename}. Set --output to another place.")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
