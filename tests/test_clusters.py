"""What launchers and schedulers put into the environment, and the place that follows from it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gram_jax.clusters import Place, detect, heartbeat_seconds, tpu_metadata, with_flags
from gram_jax.errors import UserError

ROOT = Path(__file__).parents[1]

JAX = {
    "JAX_COORDINATOR_ADDRESS": "first:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-004,007],other1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
BATCH = {
    # A batch script, before any srun.
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI_5 = {name: value for name, value in MPI.items() if name != "OMPI_MCA_orte_hnp_uri"} | {
    "PMIX_NAMESPACE": "prterun-host-77@1"
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "job-0-0.job,job-0-1.job",
    "TPU_WORKER_ID": "1",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}
JOBSET = {
    "JOB_COMPLETION_INDEX": "2",
    "JOBSET_NAME": "train",
    "REPLICATED_JOB_NAME": "worker",
    "JAX_NUM_PROCESSES": "4",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (JAX, Place("first:1234", 4, 3)),
        # What is said to JAX counts, wherever this runs.
        (SLURM | MPI | TPU | JAX, Place("first:1234", 4, 3)),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Place("node003:PORT", 7, 3, (1,))),
        # A GPU each by the scheduler's own hand: the one it sees.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Place("node003:PORT", 7, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "4,5"}, Place("node003:PORT", 7, 3, (1,))),
        # One task a node has all of its GPUs.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"},
            Place("node003:PORT", 7, 3),
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "node7"}, Place("node7:PORT", 7, 3, (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "a-1,b[2-3]"}, Place("a-1:PORT", 7, 3, (1,))),
        # srun --ntasks=1 inside a larger allocation.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (BATCH, None),
        (MPI, Place("10.96.0.1:PORT", 4, 2, (0,))),
        (MPI | SLURM, Place("10.96.0.1:PORT", 4, 2, (0,))),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::b9b:1,2620:10d::2]:43370"},
            Place("[fe80::b9b:1]:PORT", 4, 2, (0,)),
        ),
        (MPI_5 | {"JAX_COORDINATOR_ADDRESS": "n1:99"}, Place("n1:99", 4, 2, (0,))),
        (MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, Place("127.0.0.1:PORT", 4, 2, (0,))),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (TPU, Place("job-0-0.job:8482", 2, 1)),
        (TPU | SLICES, Place("job-0-0.job:8482", 6, 5)),
        (TPU | {"JAX_COORDINATOR_PORT": "77"}, Place("job-0-0.job:77", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (
            {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_ID": "1"},
            Place("a:8482", 2, 1),
        ),
        (
            {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"},
            None,
        ),
        (JOBSET, Place("train-worker-0-0.train:8476", 4, 2)),
        (JOBSET | {"JAX_COORDINATOR_ADDRESS": "x-0.svc:5"}, Place("x-0.svc:5", 4, 2)),
        ({"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "1"}, None),
    ],
)
def test_a_place_is_what_the_scheduler_says(environ, expected):
    found = detect(environ)
    if expected is not None and expected.address.endswith(":PORT"):
        assert found is not None
        host, _, port = found.address.rpartition(":")
        assert 61440 <= int(port) < 65536
        found = found._replace(address=f"{host}:PORT")
    assert found == expected


def test_steps_of_one_job_have_ports_of_their_own_and_their_tasks_the_same():
    tasks = [SLURM | {"SLURM_PROCID": str(i)} for i in range(7)]
    assert len({detect(task).address for task in tasks}) == 1
    assert detect(SLURM | {"SLURM_STEP_ID": "1"}).address != detect(SLURM).address


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (MPI_5, "mpirun: where process 0 runs is not said; set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({"JOB_COMPLETION_INDEX": "2"}, "INDEX=2: how many processes there are is not said; set"),
        (
            {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4"},
            "where process 0 runs is not said",
        ),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x must be a number"),
        (SLURM | {"SLURM_STEP_NODELIST": "["}, "SLURM_STEP_NODELIST=[ is not a list of nodes"),
        (JOBSET | {"JOB_COMPLETION_INDEX": "4"}, "JAX_PROCESS_ID=4 must be below JAX_NUM_PROCE"),
        (TPU | {"JAX_COORDINATOR_PORT": "77777"}, "JAX_COORDINATOR_ADDRESS=job-0-0.job:77777 must"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ, message):
    with pytest.raises(UserError) as caught:
        detect(environ)
    assert message in str(caught.value)


def test_flags_stand_for_the_variables():
    flags = ["prog", "--coordinator=h:1", "--num_processes", "2", "-process_id=1", "--output=x"]
    assert detect(with_flags({}, flags)) == Place("h:1", 2, 1)
    assert detect(with_flags(JAX, ["prog", "--process_id=0"])) == Place("first:1234", 4, 0)
    assert detect(with_flags(SLURM, ["prog", "--num_processes=1"])) is None
    assert heartbeat_seconds(with_flags({}, ["prog", "--heartbeat_seconds=7"])) == 7
    assert heartbeat_seconds({}) == 30
    with pytest.raises(UserError, match="GRAM_JAX_HEARTBEAT_SECONDS=4 must be at least 5"):
        heartbeat_seconds(with_flags({}, ["prog", "--heartbeat_seconds", "4"]))


def test_a_machine_without_tpus_asks_no_metadata_server():
    assert tpu_metadata({}) is None


JOIN = """
import sys
from gram_jax import distributed
distributed.start(sys.argv)
print(distributed.told_by_all(f"{distributed.process_id()}"), flush=True)
distributed.finish()
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("by", ["srun", "flags"])
def test_processes_that_are_told_of_each_other_meet(by):
    port = free_port()
    processes = []
    for i in range(2):
        environ, flags = {"JAX_PLATFORMS": "cpu"}, []
        if by == "srun":
            environ |= SLURM | {
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NODEID": "0",
                "SLURM_PROCID": str(i),
                "JAX_COORDINATOR_PORT": str(port),
            }
        else:
            flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        command = [sys.executable, "-c", JOIN, *flags]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environ, stdout=subprocess.PIPE, text=True
            )
        )
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == ["['0', '1']\n"] * 2


WAIT = """
import sys
from gram_jax import distributed
distributed.start(sys.argv)
distributed.barrier("met")
print("met", flush=True)
distributed.barrier("never" if distributed.is_main() else "come")
"""


def test_a_lost_process_is_noticed_without_a_launcher_after_the_seconds_that_a_flag_says():
    """JAX by itself would wait for 100 s."""
    port = free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--heartbeat_seconds=5"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAIT, *flags, f"--process_id={i}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["met\n"] * 2
        processes[1].kill()
        # Counted, not timed: what stops this test as well does not count.
        for _ in range(300):
            if processes[0].poll() is not None:
                break
            time.sleep(0.1)
        assert processes[0].returncode == -signal.SIGABRT
        assert "heartbeat" in processes[0].communicate(timeout=60)[1].lower()
    finally:
        for process in processes:
            process.kill()
