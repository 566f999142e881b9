"""sdtrain-schedule: looks at schedules and what they train, before anything is paid for."""

import os
import sys

HELP = """\
sdtrain-schedule shows what a choice of schedule, prediction, weighting and times amounts to. It takes the words of sdtrain, comma lists among
them, and writes one table, one picture (schedules.png) and one JSON file (schedules.json) for all that were named.

  sdtrain-schedule schedule=cosine,scaled_linear prediction=epsilon weighting=min_snr output=FOLDER
  sdtrain-schedule schedule=scaled_linear modifiers=[],[zero_terminal_snr],[shift] prediction=v weighting=simple
  sdtrain-schedule schedule=laplace schedule.scale=0.25,0.5,1 weighting=flat,simple grid=karras

output=FOLDER is `schedules` unless given.
"""


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from sdtrain.audit.audit import audit
    from sdtrain.config.boundary import known_keys
    from sdtrain.console import FOREIGN, fail, paragraph
    from sdtrain.errors import UserError

    try:
        audit(sys.argv[1:])
    except FOREIGN as error:
        fail(2, paragraph(error, lambda: known_keys("train")))
    except UserError as error:
        fail(error.exit_code, " ".join(str(error).split()))
    except OSError as error:
        fail(5, f"{error.strerror}: {error.filename}. Set output to another place.")


if __name__ == "__main__":
    main()
