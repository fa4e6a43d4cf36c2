#!/usr/bin/env bash
# Runs a Slurm of one node on this machine until it is told to stop; see usage below.
set -euo pipefail

usage() {
  cat <<'EOT'
Runs a Slurm of one node on this machine, for tests, until SIGTERM or SIGINT (Ctrl-C).

  tests/slurm_node.sh DIR

DIR is made, and takes all of its files (at most 60 characters: sockets lie there). Prints "ready"
once jobs can be submitted, by commands that find it by this variable:

  SLURM_CONF=DIR/slurm.conf sbatch launch/slurm.sbatch COMMAND...

Needs Debian's slurm-wlm and munge, which need not run as services. The node has all CPUs of this
machine, and says that it has 8 GPUs, so that jobs for GPU nodes start here. The daemons listen on
127.0.0.1 alone.

Two partitions: "main", and "urgent", whose jobs preempt those of "main" (10 seconds of notice, and
into the queue). A job that is requeued starts again after 5 seconds instead of Slurm's 2 minutes.
EOT
}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  usage
  exit 0
fi
if [[ $# -ne 1 ]]; then
  usage >&2
  exit 2
fi
PATH="$PATH:/usr/sbin"
for program in munged slurmctld slurmd; do
  if ! command -v "$program" >/dev/null; then
    echo "tests/slurm_node.sh: $program is not installed; apt-get install slurm-wlm munge" >&2
    exit 1
  fi
done
mkdir "$1" "$1/state" "$1/spool"
dir=$(cd "$1" && pwd)
user=$(id -un)

# A port where nobody listens, below 32768, where Linux takes none for outgoing connections.
free_port() {
  local candidate
  while :; do
    candidate=$((10000 + RANDOM % 22000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

touch "$dir"/gpu{0..7} # in place of /dev/nvidia0 and so on
echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
cat >"$dir/slurm.conf" <<EOT
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
# A job that is requeued waits until the credentials of its first start have expired.
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=2
EOT
export SLURM_CONF="$dir/slurm.conf"

pids=()
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  scancel --user="$user" || true # jobs would outlive the daemons
  for _ in {1..50}; do
    if [[ -z "$(squeue --noheader)" ]]; then
      break
    fi
    sleep 0.2
  done
  kill "${pids[@]}" || true
  wait
}
trap 'stop 2>/dev/null' EXIT
trap 'exit 0' TERM INT

(umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
munged --foreground --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
  --pid-file="$dir/munge.pid" --seed-file="$dir/munge.seed" --log-file="$dir/munge.log" \
  >/dev/null 2>&1 &
pids+=($!)
slurmctld -D -L "$dir/slurmctld.log" >/dev/null 2>&1 &
pids+=($!)
slurmd -D -L "$dir/slurmd.log" >/dev/null 2>&1 &
pids+=($!)

for _ in {1..100}; do
  if [[ "$(sinfo --noheader --format=%t --partition=main 2>/dev/null)" == idle ]]; then
    echo ready
    wait
    exit 1
  fi
  sleep 0.2
done
echo "tests/slurm_node.sh: the node did not come up within 20 s; logs are in $dir" >&2
exit 1
