"""Find out who started this process and which rank it has: a single process, a rank started by
rank 0 of the same run, by torchrun or by srun. Needs no torch.

Environment variables of launchers are inherited by every process started below one, and remain in
shells. They count only if they fit the run that is about to start.
"""

import os
import socket
from collections.abc import Iterable, Mapping

from sdtrain.errors import UserError

RANK_0 = "SDTRAIN_RANK_0"
"""Holds the process id of rank 0, for the ranks that it starts."""

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SLURM_VARIABLES = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
SLURM_STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEPID")
"""Set in processes started by srun, but not in the batch script itself."""
GENERIC_RANK_VARIABLES = (*TORCHRUN_VARIABLES, "NODE_RANK", "GROUP_RANK")
"""Lightning believes these whoever has set them."""
RANK_VARIABLES = (*GENERIC_RANK_VARIABLES, *SLURM_VARIABLES, "TORCHELASTIC_RUN_ID", RANK_0)
"""All variables that tell a process its rank. An arm of a sweep inherits none of them."""
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")

CONNECTION_TIMEOUT = 5.0  # seconds


def rank_before_config(typed: Mapping[str, str]) -> int:
    """Return this process's rank as far as it is known before the configuration is composed.

    It is 0 if the command line does not choose a strategy with several processes.

    typed: {key: value} of the overrides on the command line.
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


def rank_for_config(devices: int, *, is_one_process: bool) -> int:
    """Return this process's rank, and remove leftover variables that would mislead a library.

    Raises UserError, printed on every rank, if the environment does not fit the configuration.

    Args:
        devices: trainer.devices.
        is_one_process: whether strategy=single is chosen.
    """
    try:
        remove_empty_variables()
        return _rank_of_single() if is_one_process else _rank_of_several(devices)
    except UserError as error:
        error.on_every_rank = True
        raise


def remove_empty_variables() -> None:
    """Remove empty variables of launchers: they mean nothing, but Lightning parses them as
    numbers.
    """
    for name in _present(RANK_VARIABLES):
        if not os.environ[name].strip():
            del os.environ[name]


def is_started_by_rank_0() -> bool:
    return os.environ.get(RANK_0) == str(os.getppid())


def is_started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_by_srun() -> bool:
    """Whether this is a task of a Slurm step. A shell that Slurm opens is not."""
    is_step = any(os.environ.get(name) for name in SLURM_STEP_VARIABLES)
    return is_step and _is_slurm_task()


def is_started_by_launcher() -> bool:
    """Whether a launcher starts the other ranks, and not rank 0."""
    return is_started_by_torchrun() or is_started_by_srun()


def _rank_of_single() -> int:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if is_started_by_torchrun() and world_size != "1":
        raise UserError(
            f"strategy=single is one process, but torchrun has started {world_size} "
            f"(WORLD_SIZE={world_size}, TORCHELASTIC_RUN_ID is set)",
            key="strategy",
            remedy=f"Set strategy=ddp trainer.devices={world_size}, or start one process; "
            f"outside of torchrun, {_unset(['TORCHELASTIC_RUN_ID', 'WORLD_SIZE'])}.",
        )
    _remove(RANK_VARIABLES)
    return 0


def _rank_of_several(devices: int) -> int:
    if is_started_by_rank_0():
        return int(os.environ["LOCAL_RANK"])
    if is_started_by_torchrun():
        return _rank_under_torchrun(devices)
    if _is_slurm_task():
        return _rank_under_slurm(devices)
    names = _present(GENERIC_RANK_VARIABLES)
    if names:
        assignments = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UserError(
            f"The environment has {assignments}, which would make this process one of several, but "
            "neither torchrun nor srun has started it",
            key="strategy",
            remedy=f"Either {_unset(names)} so that sdtrain starts the {devices} ranks itself, or "
            f"use torchrun --nproc-per-node={devices}.",
        )
    _remove([*RANK_VARIABLES, *RENDEZVOUS_VARIABLES])
    return 0


def _rank_under_torchrun(devices: int) -> int:
    rank, _, world_size = _read_numbers(TORCHRUN_VARIABLES, "torchrun")
    names = ["TORCHELASTIC_RUN_ID", *TORCHRUN_VARIABLES]
    if world_size != devices:
        raise UserError(
            f"WORLD_SIZE={world_size} means that torchrun has started {world_size} processes, "
            f"but trainer.devices={devices}",
            key="trainer.devices",
            remedy=f"Set trainer.devices={world_size}, or {_unset(names)} so that sdtrain starts "
            "the ranks itself.",
        )
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} is not in the range of WORLD_SIZE={world_size}",
            key="strategy",
            remedy=f"Start it with torchrun, or {_unset(names)}.",
        )
    uses_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if uses_agent_store and not _rendezvous_answers():
        address = ":".join(os.environ.get(name, "") for name in RENDEZVOUS_VARIABLES)
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set, but there is no torchrun at {address}",
            key="strategy",
            remedy=f"Start it with torchrun, or {_unset(names)} so that sdtrain starts the "
            "ranks itself.",
        )
    return rank


def _rendezvous_answers() -> bool:
    """Whether a process listens at the address where torchrun lets the ranks meet."""
    try:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(address, CONNECTION_TIMEOUT).close()
    except (OSError, KeyError, ValueError):
        return False
    return True


def _is_slurm_task() -> bool:
    """Lightning's own criterion."""
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not is_shell


def _rank_under_slurm(devices: int) -> int:
    tasks, rank, _ = _read_numbers(SLURM_VARIABLES, "Slurm")
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "").strip()
    nodes = os.environ.get("SLURM_NNODES", "1").strip()
    problem = ""
    if tasks != devices:
        problem = f"SLURM_NTASKS={tasks} says that Slurm has started {tasks}"
    elif per_node != str(devices):
        problem = f"SLURM_NTASKS_PER_NODE={per_node or 'unset'} gives another number"
    elif nodes != "1":
        problem = f"SLURM_NNODES={nodes} spreads them over nodes, but sdtrain trains on one"
    elif not is_started_by_srun():
        problem = f"SLURM_NTASKS={tasks} is set without SLURM_STEP_ID: srun has started no task"
    elif not 0 <= rank < tasks:
        problem = f"SLURM_PROCID={rank} is not in the range of {tasks} tasks"
    if problem:
        raise UserError(
            f"trainer.devices={devices} needs as many tasks on one node, one for each device; "
            f"{problem}",
            key="trainer.devices",
            remedy=f"Start it with srun --nodes=1 --ntasks-per-node={devices}, or "
            f"{_unset(['SLURM_NTASKS'])} so that sdtrain starts the ranks itself.",
        )
    _remove(GENERIC_RANK_VARIABLES)  # left over from another launcher; Lightning would use them
    return rank


def _read_numbers(names: Iterable[str], launcher: str) -> list[int]:
    """Return the integers in the environment variables that `launcher` sets. Raises UserError."""
    numbers = []
    for name in names:
        value = os.environ.get(name)
        try:
            numbers.append(int(value or ""))
        except ValueError:
            problem = f"{name} is missing" if value is None else f"{name}={value} is not a number"
            raise UserError(
                f"{problem}, although {launcher} seems to have started this process",
                key="strategy",
                remedy=f"Start all ranks with {launcher}, or remove its variables from the "
                "environment.",
            ) from None
    return numbers


def _unset(names: Iterable[str]) -> str:
    """Return the shell command that removes those variables that are set."""
    return f"unset {' '.join(_present(names) or names)}"


def _present(names: Iterable[str]) -> list[str]:
    """Return those of the environment variables that are set."""
    return [name for name in names if name in os.environ]


def _remove(names: Iterable[str]) -> None:
    for name in names:
        os.environ.pop(name, None)
