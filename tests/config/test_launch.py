"""Which rank a process is, by what has started it and what it trains."""

import os
import socket

import pytest

from sdtrain.config.launch import (
    RANK_0,
    RANK_VARIABLES,
    RENDEZVOUS_VARIABLES,
    rank_before_config,
    rank_for_config,
)
from sdtrain.errors import UserError

SRUN = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}
OWN = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", RANK_0: str(os.getppid())}


@pytest.fixture
def environment(monkeypatch):
    """environment({...}): these variables, and no others that tell of a rank."""

    def set_to(variables):
        for name in (
            *RANK_VARIABLES,
            *RENDEZVOUS_VARIABLES,
            "SLURM_NTASKS_PER_NODE",
            "SLURM_NNODES",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_rank_of_two_is_what_its_launcher_says(environment):
    for variables in (SRUN, TORCHRUN, OWN, SRUN | {"RANK": "0", "WORLD_SIZE": "1"}):
        environment(variables)
        assert rank_before_config({"strategy": "ddp"}) == 1
        assert rank_for_config(2, is_one_process=False) == 1
    environment({"MASTER_ADDR": "elsewhere", "SLURM_PROCID": "1", "RANK": "", "LOCAL_RANK": " "})
    assert rank_for_config(2, is_one_process=False) == 0
    assert "MASTER_ADDR" not in os.environ
    environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"})
    assert rank_for_config(2, is_one_process=False) == 0


def test_one_process_is_rank_0_and_no_library_is_misled(environment):
    """Whatever is left over, and as a task of a job array's that is no rank of ours."""
    for variables in (SRUN, OWN, TORCHRUN | {"WORLD_SIZE": "1"}, {"RANK": ""}, {"RANK": "x"}):
        environment(variables)
        assert rank_before_config({}) == 0
        assert rank_for_config(1, is_one_process=True) == 0
        assert not set(RANK_VARIABLES) & os.environ.keys()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        ({"RANK": "1"}, "RANK=1"),
        ({"RANK": "x"}, "RANK=x"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0, WORLD_SIZE=1"),
        (OWN | {RANK_0: str(os.getppid() + 1)}, "LOCAL_RANK=1, WORLD_SIZE=2"),
        (TORCHRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": ""}, "RANK is missing"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2"),
        (SRUN | {"SLURM_NTASKS": "1"}, "SLURM_NTASKS=1"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "1"}, "SLURM_NTASKS_PER_NODE=1"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": ""}, "SLURM_NTASKS_PER_NODE=unset"),
        (SRUN | {"SLURM_NNODES": "2"}, "SLURM_NNODES=2"),
        (SRUN | {"SLURM_STEP_ID": ""}, "SLURM_STEP_ID"),
        (SRUN | {"SLURM_PROCID": "2"}, "SLURM_PROCID=2"),
    ],
)
def test_what_does_not_fit_two_ranks_is_named_by_every_process(environment, variables, named):
    environment(variables)
    with pytest.raises(UserError) as refused:
        rank_for_config(2, is_one_process=False)
    assert named in str(refused.value)
    assert refused.value.key in ("strategy", "trainer.devices")
    assert refused.value.on_every_rank


def test_a_torchrun_that_is_gone_is_not_waited_for(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": port}
        environment(TORCHRUN | variables)
        assert rank_for_config(2, is_one_process=False) == 1
    with pytest.raises(UserError) as refused:
        rank_for_config(2, is_one_process=False)
    assert "TORCHELASTIC_RUN_ID" in str(refused.value)


TASK = SRUN | {"SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, ["sdtrain", "schedule=cosin"]),
        (TASK, ["sdtrain", "trainer.max_images=0"]),
        (TASK, ["sdtrain", "strategy=ddp", "trainer.devices=2"]),
        ({"RANK": "1"}, ["sdtrain-sample", "checkpoint=nowhere", "prompt=x"]),
        (TASK, ["sdtrain-evaluate", "checkpoint=nowhere"]),
        (TASK, ["sdtrain-schedule", "schedule=cosin"]),
        ({"RANK": "1"}, ["sdtrain-report", "nowhere"]),
    ],
)
def test_every_command_speaks_whatever_is_left_over(here, environment, tmp_path, variables, words):
    environment(variables)
    result = here(*words, cwd=tmp_path)
    assert result.code in (2, 5)
    assert result.paragraph
