"""The command sdtrain-schedule: show what a schedule and a weighting train, before training."""

import sys

from sdtrain.config.boundary import error_boundary
from sdtrain.console import secure_streams

HELP = """\
sdtrain-schedule shows what a choice of schedule, prediction, weighting and
times does in training. It takes the same overrides as sdtrain, also with
several values separated by commas, prints a table of all combinations, and
writes a plot (schedules.png) and a JSON file (schedules.json).

  sdtrain-schedule schedule=cosine,scaled_linear weighting=min_snr output=FOLDER
  sdtrain-schedule modifiers=[],[zero_terminal_snr],[shift] prediction=v
  sdtrain-schedule schedule=laplace schedule.scale=0.5,1 weighting=flat,simple

output=FOLDER is the folder to write to (default: schedules).
"""


def main() -> None:
    secure_streams()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return
    with error_boundary("train"):
        from sdtrain.audit.request import read_request

        request = read_request(sys.argv[1:])
        from sdtrain.audit.audit import write_audit

        write_audit(request)


if __name__ == "__main__":
    main()
