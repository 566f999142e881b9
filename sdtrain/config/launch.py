"""Who has started this process, and which rank that makes it: the user, rank 0 of the same run,
torchrun or srun. Without torch.

Variables of launchers are inherited by everything that is started below one, and stay in shells.
They count only where they fit what is going to be trained.
"""

import os
import socket
from collections.abc import Iterable, Mapping

from sdtrain.errors import UserError

RANK_0 = "SDTRAIN_RANK_0"
"""Process id of rank 0, for the ranks that it starts."""

OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
OF_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OF_A_STEP = ("SLURM_STEP_ID", "SLURM_STEPID")
"""Variables of what srun starts, which a batch script itself has not."""
LEFT_OVER = (*OF_TORCHRUN, "NODE_RANK", "GROUP_RANK")
RANK_VARIABLES = (*LEFT_OVER, *OF_SLURM, "TORCHELASTIC_RUN_ID", RANK_0)
"""All that tell a process of its place among others. An arm of a sweep gets none of them."""
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")

REACHED_IN = 5.0  # seconds


def typed_rank(typed: Mapping[str, str]) -> int:
    """This process's rank as long as its configuration is not known.

    typed: {key: value} of the words. Where they choose no strategy of several processes it is 0.
    """
    if typed.get("strategy", "single") == "single":
        return 0
    try:
        if is_started_by_rank_0():
            return int(os.environ["LOCAL_RANK"])
        if is_started_by_torchrun():
            return int(os.environ["RANK"])
        return int(os.environ["SLURM_PROCID"]) if is_started_by_srun() else 0
    except (KeyError, ValueError):
        return 0


def settled_rank(devices: int, *, is_one_process: bool) -> int:
    """This process's rank. What was left over in the environment is removed, so that no library
    is misled by it.

    Raises UserError, which every process prints, where the environment does not fit.
    """
    try:
        forget_empty()
        return _rank_of_one() if is_one_process else _rank_of_several(devices)
    except UserError as error:
        error.aloud = True
        raise


def forget_empty() -> None:
    """Removes variables of launchers that are empty: an empty one says nothing, and Lightning takes
    it for a number.
    """
    _forget([name for name in RANK_VARIABLES if not os.environ.get(name, "x").strip()])


def is_started_by_rank_0() -> bool:
    return os.environ.get(RANK_0) == str(os.getppid())


def is_started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_by_srun() -> bool:
    """As a task of a step; a shell that Slurm gives is none."""
    is_step = any(os.environ.get(name) for name in OF_A_STEP)
    return is_step and _is_task_of_slurm()


def is_started_by_launcher() -> bool:
    """Whether the other ranks are not started by rank 0."""
    return is_started_by_torchrun() or is_started_by_srun()


def _rank_of_one() -> int:
    world = os.environ.get("WORLD_SIZE", "1")
    if is_started_by_torchrun() and world != "1":
        raise UserError(
            f"strategy=single is one process, and torchrun has started {world} "
            f"(WORLD_SIZE={world}, TORCHELASTIC_RUN_ID is set)",
            key="strategy",
            remedy=f"Set strategy=ddp trainer.devices={world}, or start one; "
            f"outside of torchrun {_unset(['TORCHELASTIC_RUN_ID', 'WORLD_SIZE'])}.",
        )
    _forget(RANK_VARIABLES)
    return 0


def _rank_of_several(devices: int) -> int:
    if is_started_by_rank_0():
        return int(os.environ["LOCAL_RANK"])
    if is_started_by_torchrun():
        return _rank_under_torchrun(devices)
    if _is_task_of_slurm():
        return _rank_under_slurm(devices)
    names = [name for name in LEFT_OVER if name in os.environ]
    if names:
        shown = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UserError(
            f"{shown} in the environment would make this process one of several, and neither "
            "torchrun nor srun has started it",
            key="strategy",
            remedy=f"Either {_unset(names)}, and sdtrain starts the {devices} ranks itself, or use "
            f"torchrun --nproc-per-node={devices}.",
        )
    _forget([*RANK_VARIABLES, *MEETING_POINT])
    return 0


def _rank_under_torchrun(devices: int) -> int:
    rank, _, world = (_number(name, "torchrun") for name in OF_TORCHRUN)
    names = ["TORCHELASTIC_RUN_ID", *OF_TORCHRUN]
    if world != devices:
        raise UserError(
            f"WORLD_SIZE={world} says that torchrun has started {world} processes, "
            f"and trainer.devices={devices}",
            key="trainer.devices",
            remedy=f"Set trainer.devices={world}, or {_unset(names)}, and sdtrain starts the ranks "
            "itself.",
        )
    if not 0 <= rank < world:
        raise UserError(
            f"RANK={rank} is no rank of the {world} that WORLD_SIZE={world} tells of",
            key="strategy",
            remedy=f"Start it by torchrun, or {_unset(names)}.",
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not _is_answered():
        place = ":".join(os.environ.get(name, "") for name in MEETING_POINT)
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set, but there is no torchrun at {place}",
            key="strategy",
            remedy=f"Start it by torchrun, or {_unset(names)}, and sdtrain starts the ranks "
            "itself.",
        )
    return rank


def _is_answered() -> bool:
    """Whether anybody listens where torchrun has said that ranks meet."""
    try:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(address, REACHED_IN).close()
    except (OSError, KeyError, ValueError):
        return False
    return True


def _is_task_of_slurm() -> bool:
    """As Lightning decides it."""
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not is_shell


def _rank_under_slurm(devices: int) -> int:
    tasks, rank, _ = (_number(name, "Slurm") for name in OF_SLURM)
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "").strip()
    nodes = os.environ.get("SLURM_NNODES", "1").strip()
    problem = ""
    if tasks != devices:
        problem = f"SLURM_NTASKS={tasks} says that Slurm has started {tasks}"
    elif per_node != str(devices):
        problem = f"SLURM_NTASKS_PER_NODE={per_node or 'unset'} tells of another number"
    elif nodes != "1":
        problem = f"SLURM_NNODES={nodes} spreads them over nodes, and sdtrain trains on one"
    elif not is_started_by_srun():
        problem = f"SLURM_NTASKS={tasks} is there without SLURM_STEP_ID: srun has started none"
    elif not 0 <= rank < tasks:
        problem = f"SLURM_PROCID={rank} is none of {tasks}"
    if problem:
        raise UserError(
            f"trainer.devices={devices} wants as many tasks on one node, one for each device; "
            f"{problem}",
            key="trainer.devices",
            remedy=f"Start it by srun --nodes=1 --ntasks-per-node={devices}, or "
            f"{_unset(['SLURM_NTASKS'])}, and sdtrain starts the ranks itself.",
        )
    _forget(LEFT_OVER)  # of another launcher: Lightning would believe them
    return rank


def _number(name: str, launcher: str) -> int:
    value = os.environ.get(name)
    try:
        return int(value or "")
    except ValueError:
        found = "is missing" if value is None else f"={value} is no number"
        joint = " " if value is None else ""
        raise UserError(
            f"{name}{joint}{found}, though {launcher} seems to have started this process",
            key="strategy",
            remedy=f"Start all ranks by {launcher}, or remove its variables from the environment.",
        ) from None


def _unset(names: Iterable[str]) -> str:
    found = [name for name in names if name in os.environ]
    return f"unset {' '.join(found or names)}"


def _forget(names: Iterable[str]) -> None:
    for name in names:
        os.environ.pop(name, None)
