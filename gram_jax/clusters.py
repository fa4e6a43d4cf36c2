"""Which of how many processes this is: what flags, launchers and schedulers say in the environment.

Looked for in this order; the first that is there counts:

  JAX_*     JAX_COORDINATOR_ADDRESS (HOST:PORT where process 0 listens), JAX_NUM_PROCESSES and
            JAX_PROCESS_ID, all three; flags of the same meaning are turned into them
  Open MPI  mpirun's OMPI_COMM_WORLD_*
  Slurm     a step of srun; a batch script alone is one process, whatever was allocated
  TPU       TPU_WORKER_HOSTNAMES and TPU_WORKER_ID (GKE), with MEGASCALE_* for several slices
  JobSet    JOB_COMPLETION_INDEX of an Indexed Job, with JOBSET_NAME and REPLICATED_JOB_NAME

One or two of the JAX_* variables replace what a scheduler says, or add what it does not, and
JAX_NUM_PROCESSES=1 alone means one process for itself. On TPU machines outside of Kubernetes JAX's
own detector asks the metadata server. `docs/hosts.md` has what to set where.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gram_jax.errors import UserError

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "GRAM_JAX_HEARTBEAT_SECONDS"
FLAGS = {
    "coordinator": ADDRESS,
    "num_processes": COUNT,
    "process_id": ID,
    "heartbeat_seconds": HEARTBEAT,
}
"""The flags, and the variables that they stand for."""

HEARTBEAT_SECONDS = 30
"""By default. A machine that is suspended, or cut off, for longer is taken for lost."""

_SHORTEST_HEARTBEAT = 5
_PORT = "JAX_COORDINATOR_PORT"
_FIRST_PORT, _PORTS = 61440, 4096  # above those that Linux gives to outgoing connections
_TPU_PORT, _JOBSET_PORT = 8482, 8476


class Place(NamedTuple):
    """Which of how many processes this is, and where process 0 listens.

    Attributes:
      address: HOST:PORT of process 0.
      devices: the GPUs that are this process's, of those it can see; None for all of them.
    """

    address: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None = None


class _Found(NamedTuple):
    """What a scheduler says; "" and 0 where it does not."""

    name: str
    host: str
    port: int
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None = None


def detect(environ: Mapping[str, str]) -> Place | None:
    """This process's place; None where it is alone.

    Raises:
      UserError: variables are missing, or are not what they must be.
    """
    given = {name: environ.get(name, "") for name in (ADDRESS, COUNT, ID)}
    if given[COUNT] == "1":
        return None
    found = None
    if not all(given.values()):
        finders = (_openmpi, _slurm, _tpu, _jobset)
        found = next((one for finder in finders if (one := finder(environ))), None)
    if found is None:
        return _given(given) if any(given.values()) else None
    count = _number(given, COUNT) if given[COUNT] else found.num_processes
    if count == 1:
        return None
    if not count:
        raise UserError(
            f"{found.name}: how many processes there are is not said; set {COUNT} (1: this process"
            " is alone)"
        )
    port = _number(environ, _PORT) if environ.get(_PORT) else found.port
    address = given[ADDRESS] or (f"{found.host}:{port}" if found.host else "")
    if not address:
        raise UserError(
            f"{found.name}: where process 0 runs is not said; set {ADDRESS}=HOST:PORT, or {COUNT}=1"
            " for a process that is alone"
        )
    number = _number(given, ID) if given[ID] else found.process_id
    return _checked(Place(address, count, number, found.devices))


def heartbeat_seconds(environ: Mapping[str, str]) -> int:
    """After how long without a sign of life a process is taken for lost.

    Raises:
      UserError: it is no number, or so small that a busy machine would be taken for lost.
    """
    found = _optional(environ, HEARTBEAT, HEARTBEAT_SECONDS)
    if found < _SHORTEST_HEARTBEAT:
        raise UserError(f"{HEARTBEAT}={found} must be at least {_SHORTEST_HEARTBEAT}")
    return found


def _given(given: Mapping[str, str]) -> Place:
    """What the three variables say, where nothing else does."""
    missing = [name for name, value in given.items() if not value]
    if missing:
        said = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise UserError(
            f"{said}, but without {' and '.join(missing)}: set all three, as launch/local.sh does,"
            " or none for one process"
        )
    return _checked(Place(given[ADDRESS], _number(given, COUNT), _number(given, ID)))


def _checked(place: Place) -> Place:
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS}={place.address} must read HOST:PORT")
    if place.process_id >= place.num_processes:
        raise UserError(f"{ID}={place.process_id} must be below {COUNT}={place.num_processes}")
    return place


def with_flags(environ: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """The environment with the variables that `FLAGS` stand for: they are needed before the command
    line can be parsed."""
    found = dict(environ)
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and name.lstrip("-") in FLAGS:
            found[FLAGS[name.lstrip("-")]] = value if equals else after
    return found


def _openmpi(environ: Mapping[str, str]) -> _Found | None:
    """mpirun. Process 0 is taken to run where mpirun does, as JAX's own detector does; Open MPI 5
    no longer says where that is, which does not matter on one machine."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if not all(environ.get(name) for name in names):
        return None
    count, number = (_number(environ, name) for name in names)
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    here = _optional(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    launcher = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", uri)
    host = ""
    if here == count:
        host = "127.0.0.1"
    elif launcher:
        host = launcher[1] or f"{launcher[2]}]"
    local = _optional(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    job = uri.partition(";")[0] or environ.get("PMIX_NAMESPACE", "")
    return _Found("mpirun", host, _port_of(job), count, number, _share(environ, local, here))


def _slurm(environ: Mapping[str, str]) -> _Found | None:
    """A task of srun. In a batch script SLURM_NTASKS is what was allocated, and no step runs."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if not all(environ.get(name) for name in names):
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count = _number(environ, tasks)
    per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _optional(environ, "SLURM_NODEID", 0)
    here = per_node[node] if node < len(per_node) else 1
    local = _optional(environ, "SLURM_LOCALID", 0)
    job = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}"
    return _Found(
        "srun",
        _first_host(environ["SLURM_STEP_NODELIST"]),
        _port_of(job),
        count,
        _number(environ, "SLURM_PROCID"),
        _share(environ, local, here),
    )


def _first_host(nodes: str) -> str:
    """``gpu3`` of ``gpu[3-5,9],cpu1``: Slurm puts task 0 there."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} is not a list of nodes")
    return match[1] + (match[2] or "")


def _tasks_per_node(text: str) -> list[int]:
    """``[4, 4, 1]`` of ``4(x2),1``."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _share(environ: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
    """The GPUs of one of ``here`` processes of a machine: all if it is alone there, else the one of
    its number, unless the scheduler has bound it to fewer already."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    bound = visible is not None and len(visible.split(",")) < here
    return None if here == 1 or bound else (local,)


def _tpu(environ: Mapping[str, str]) -> _Found | None:
    """What GKE gives to a pod with TPUs; JAX's own detector reads the same."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts or not environ.get("TPU_WORKER_ID") or not _may_use_tpus(environ):
        return None
    workers = hosts.split(",")
    slices = _optional(environ, "MEGASCALE_NUM_SLICES", 1)
    of_slice = _optional(environ, "MEGASCALE_SLICE_ID", 0)
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    return _Found(
        "TPU_WORKER_HOSTNAMES",
        first.partition(":")[0],
        _TPU_PORT,
        len(workers) * slices,
        _number(environ, "TPU_WORKER_ID") + of_slice * len(workers),
    )


def _may_use_tpus(environ: Mapping[str, str]) -> bool:
    return "tpu" in environ.get("JAX_PLATFORMS", "tpu")


def _jobset(environ: Mapping[str, str]) -> _Found | None:
    """A pod of an Indexed Job. Kubernetes says which it is, and not how many there are. In a JobSet
    the first pod is JOBSET-JOB-0-0 in a subdomain with the name of the JobSet."""
    if not environ.get("JOB_COMPLETION_INDEX"):
        return None
    jobset, job = environ.get("JOBSET_NAME", ""), environ.get("REPLICATED_JOB_NAME", "")
    host = f"{jobset}-{job}-0-0.{jobset}" if jobset and job else ""
    index = _number(environ, "JOB_COMPLETION_INDEX")
    return _Found(f"JOB_COMPLETION_INDEX={index}", host, _JOBSET_PORT, 0, index)


def tpu_metadata(environ: Mapping[str, str]) -> Place | None:
    """This machine's place among those of a Cloud TPU outside of Kubernetes; None elsewhere.

    Asks the metadata server, through JAX, and only on a machine that has TPUs.

    Raises:
      UserError: the server does not answer.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    from jax._src.clusters import GceTpuCluster

    if not running_in_cloud_tpu_vm or not _may_use_tpus(environ) or environ.get(COUNT) == "1":
        return None
    try:
        if not GceTpuCluster.is_env_present() or (count := GceTpuCluster.get_process_count()) == 1:
            return None
        address = GceTpuCluster.get_coordinator_address(
            timeout_secs=60, override_coordinator_port=environ.get(_PORT)
        )
        return _checked(Place(address, count, GceTpuCluster.get_process_id()))
    except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"this machine has TPUs, but its metadata server does not say what they are part of"
            f" ({error}); set {COUNT}=1 for one process, or {ADDRESS}, {COUNT} and {ID}"
        ) from error


def _port_of(job: str) -> int:
    """The same port in all processes of a job, and most likely another one in another job."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _optional(environ: Mapping[str, str], name: str, default: int) -> int:
    return _number(environ, name) if environ.get(name) else default


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value} must be a number")
    return int(value)
