"""Starts sdtrain's commands without paying for their imports: imports once, then forks a process
per line of stdin.

What it forks is a real process: it has its own argv, environment, signals, exit handlers and exit
code. Each request is a line of JSON {argv, cwd, env, output}; the answers are a line {"pid": ...}
and, once it has ended, a line {"code": ...}.

$BEFORE, as FILE:EXPRESSION, is evaluated in the namespace of that file before the command begins,
in each of its ranks: what a test wants to happen in there.
"""

import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys

import sdtrain

MAINS = {"sdtrain": "train", "sdtrain-sample": "sample", "sdtrain-evaluate": "evaluate"}


def become(job: dict) -> None:
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:0] = [p for p in job["env"].get("PYTHONPATH", "").split(":") if p]
    streams = ("/dev/null", f"{job['output']}/stdout", f"{job['output']}/stderr")
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.argv = job["argv"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command(MAINS[os.path.basename(sys.argv[0])])


def command(name: str) -> None:
    if before := os.environ.get("BEFORE"):
        sys.argv[0] = __file__  # by which Lightning starts the other ranks
        file, _, expression = before.partition(":")
        eval(expression, runpy.run_path(file))
    importlib.import_module(f"sdtrain.commands.{name}").main()


def serve() -> None:
    for module in pkgutil.walk_packages(sdtrain.__path__, "sdtrain."):
        importlib.import_module(module.name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            # By return, so that the interpreter leaves as it always does.
            return become(json.loads(line))
        os.setpgid(pid, pid)  # here as well as there: whoever comes first
        print(json.dumps({"pid": pid}), flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code}), flush=True)


if __name__ == "__main__":
    command("train") if sys.argv[1:] else serve()
