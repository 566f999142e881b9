"""Starts sdtrain's commands without paying for their imports: imports once, then forks a process
per line of stdin.

What it forks is a real process: it has its own argv, environment, signals, exit handlers and exit
code. Each request is a line of JSON {argv, cwd, env, output}; the answers are a line {"pid": ...}
and, once it has ended, a line {"code": ...}.

$BEFORE, as FILE:EXPRESSION, is evaluated in the namespace of that file before the command begins,
in each of its ranks: what a test wants to happen in there.

The other ranks of a run wait as forks of rank 0, made before it has done anything, and become what
Lightning starts: with the command line, environment and folder that it gives. With $RANKS=imported
it starts them itself.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

from lightning.pytorch.strategies.launchers import subprocess_script as launchers

import sdtrain

MAINS = {"sdtrain": "train", "sdtrain-sample": "sample", "sdtrain-evaluate": "evaluate"}


class ForkedRank(subprocess.Popen):
    """A rank: a child that waits already, and needs no imports any more."""

    waiting: list[tuple[int, int]] = []
    """(process id, the pipe from which it reads what to become)."""

    def _execute_child(self, args, executable, preexec, close, passed, cwd, env, *given) -> None:
        if not self.waiting:
            return super()._execute_child(
                args, executable, preexec, close, passed, cwd, env, *given
            )
        self.pid, pipe = self.waiting.pop(0)
        self._child_created = True
        with open(pipe, "w") as file:
            json.dump({"argv": args[1:], "cwd": cwd, "env": dict(env)}, file)


def wait_as_rank() -> bool:
    """Fork a rank that waits. Return True in there, once it is to begin."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        ForkedRank.waiting.append((pid, writing))
        return False
    for _, pipe in [*ForkedRank.waiting, (0, writing)]:
        os.close(pipe)
    with open(reading) as file:
        job = json.loads(file.read() or "{}")
    if not job:  # rank 0 has ended without one
        os._exit(0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    return True


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
    name = MAINS[os.path.basename(sys.argv[0])]
    others = [word for word in sys.argv if word.startswith("trainer.devices=")]
    if others and "-m" not in sys.argv and os.environ.get("RANKS") != "imported":
        launchers.subprocess = SimpleNamespace(Popen=ForkedRank)
        for _ in range(1, int(others[-1].partition("=")[2])):
            if wait_as_rank():
                break
    command(name)


def command(name: str) -> None:
    if before := os.environ.get("BEFORE"):
        sys.argv[0] = __file__  # by which Lightning starts the other ranks
        file, _, expression = before.partition(":")
        eval(expression, runpy.run_path(file))
    importlib.import_module(f"sdtrain.commands.{name}").main()


def serve() -> None:
    for module in pkgutil.walk_packages(sdtrain.__path__, "sdtrain."):
        importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
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
