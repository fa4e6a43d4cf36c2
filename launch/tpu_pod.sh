#!/usr/bin/env bash
# Runs a command on all machines of a Cloud TPU slice, from here; see usage below.
# shellcheck disable=SC2016 # most of what stands in single quotes is for the machines' shells
set -euo pipefail

usage() {
  cat <<'EOT'
Asks for a Cloud TPU slice (a queued resource), installs gram_jax on all of its machines, and runs a
command there, one process per machine, in the folder of this repository:

  launch/tpu_pod.sh [OPTIONS] create NAME TYPE [FLAGS...]   TYPE as in v5p-128; FLAGS as --spot
  launch/tpu_pod.sh [OPTIONS] status NAME         its state; ACTIVE: it can be used, and costs
  launch/tpu_pod.sh [OPTIONS] install NAME        the last commit; again after a new one
  launch/tpu_pod.sh [OPTIONS] run NAME COMMAND... starts it, and returns
  launch/tpu_pod.sh [OPTIONS] follow NAME         what process 0 says; Ctrl-C ends this only
  launch/tpu_pod.sh [OPTIONS] stop NAME           SIGTERM: the command saves and ends with status 75
  launch/tpu_pod.sh [OPTIONS] delete NAME

  --zone=ZONE             where the slice is; required
  --project=PROJECT       default: that of gcloud
  --slices=N              create: N slices of TYPE that work as one
  --share=SERVER:/PATH    install: mounts this NFS share (as of Filestore) on /mnt/share
  --dry-run               prints every command, and runs none

  launch/tpu_pod.sh --zone=us-east5-a create big v5p-128 --spot
  launch/tpu_pod.sh --zone=us-east5-a --share=10.0.0.2:/share install big
  launch/tpu_pod.sh --zone=us-east5-a run big python -m gram_jax.pretrain \
    --config=configs/NAME.py:/mnt/share/data --workdir=/mnt/share/runs/NAME

Needs: gcloud, logged in; quota for TPUs in that zone; data and workdir on a file system that all
  machines share. TPU v2 to v6e: later ones come through GKE only (launch/gke_jobset.yaml).
Costs: the price of all chips, from ACTIVE until `delete`, whether something runs there or not, and
  also after the command has ended. `gcloud compute tpus queued-resources list --zone=ZONE` shows
  what there is; the share is paid for apart.
Preemption: a slice made with --spot may be taken away at half a minute's notice; the state is
  SUSPENDED then. `delete` it, `create`, `install` and `run` with the same command and workdir: it
  goes on from the newest checkpoint (checkpoint.every says how much is lost at most), on another
  number of machines, too. After `stop`, `run` is enough.
EOT
}

fail() {
  echo "launch/tpu_pod.sh: $1; launch/tpu_pod.sh --help explains" >&2
  exit 2
}

dry_run=""
zone=""
project=""
slices=1
share=""
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) dry_run=1 ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --share=*) share="${1#*=}" ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done
[[ $# -ge 2 ]] || fail "an action and a NAME are needed"
[[ -n "$zone" ]] || fail "--zone=ZONE is needed"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a number from 1"
[[ "$2" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "NAME $2 must be of a-z, 0-9 and -"
action=$1
name=$2
shift 2

# Runs a command, or prints it in a form that can be pasted.
run() {
  if [[ -z "$dry_run" ]]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[-a-zA-Z0-9_./:=,@~]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="$word "
  done
  echo "${line% }"
}

# queued_resources VERB ARGUMENTS...
queued_resources() {
  run gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" \
    ${project:+--project="$project"} "${@:2}"
}

# on_all COMMAND: in the shell of every machine of every slice.
on_all() {
  queued_resources ssh --node=all --worker=all --command="$1"
}

create() {
  [[ $# -ge 1 ]] || fail "create $name: a TYPE is needed, as v5p-128"
  local type=$1 version
  shift
  # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) fail "TYPE $type is none of v2-N, v3-N, v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
  local nodes=(--node-id="$name")
  if ((slices > 1)); then
    nodes=(--node-count="$slices" --node-prefix="$name")
  fi
  queued_resources create "${nodes[@]}" --accelerator-type="$type" --runtime-version="$version" "$@"
}

install() {
  local archive=${TMPDIR:-/tmp}/gram_jax-$name.tar.gz root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  run git -C "$root" archive --format=tar.gz --prefix=gram_jax/ --output="$archive" HEAD
  run gcloud compute tpus queued-resources scp "$archive" "$name:gram_jax.tar.gz" --zone="$zone" \
    ${project:+--project="$project"} --node=all --worker=all
  # The machines' own Python is older than 3.11; uv brings one.
  on_all 'set -e
rm -rf gram_jax
tar -xzf gram_jax.tar.gz
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --clear --python=3.11 venv
~/.local/bin/uv pip install --quiet --python=venv -c gram_jax/constraints.txt -e "./gram_jax[tpu]"
echo "$(hostname): installed"'
  if [[ -n "$share" ]]; then
    on_all "set -e
sudo apt-get -qq update
sudo apt-get -qq install nfs-common
sudo mkdir -p /mnt/share
mountpoint -q /mnt/share || sudo mount -t nfs -o hard ${share@Q} /mnt/share"
  fi
}

# The shell that waits for the command outlives the signal that ends it, to write down its status.
start() {
  [[ $# -ge 1 ]] || fail "run $name: a COMMAND is needed"
  on_all 'if kill -0 "$(cat run.pid 2>/dev/null || echo none)" 2>/dev/null; then
  echo "$(hostname): a command is running; stop it first" >&2
  exit 1
fi
rm -f run.status
cd gram_jax
PATH="$HOME/venv/bin:$PATH" nohup setsid bash -c '\''trap : TERM; "$@"; echo $? >~/run.status'\'' \
  bash '"$(printf '%q ' "$@")"'>>~/run.log 2>&1 </dev/null &
echo $! >~/run.pid'
}

status() {
  local state
  state=$(queued_resources describe --format='value(state.state)')
  echo "$state"
  if [[ -z "$dry_run" && "$state" != ACTIVE ]]; then
    return
  fi
  on_all 'if [ ! -e run.pid ]; then
  echo "$(hostname): nothing was started"
elif kill -0 "$(cat run.pid)" 2>/dev/null; then
  echo "$(hostname): running; $(tail -n 1 run.log)"
else
  echo "$(hostname): ended with status $(cat run.status); $(tail -n 1 run.log)"
fi'
}

case "$action" in
  create) create "$@" ;;
  status) status ;;
  install) install ;;
  run) start "$@" ;;
  follow) queued_resources ssh --node=0 --worker=0 --command='tail -n 50 -F run.log' ;;
  stop) on_all 'kill -TERM -- "-$(cat run.pid)"' ;;
  # --force: with the machines
  delete) queued_resources delete --force ;;
  *) fail "unknown action $action" ;;
esac
