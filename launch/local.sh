#!/usr/bin/env bash
# Runs a command as several processes of this machine that compute together; see usage below.
set -euo pipefail

usage() {
  cat <<'EOF'
Runs a command as N processes of this machine that compute together, as processes of a cluster do.

  launch/local.sh N COMMAND...
  launch/local.sh 2 python -m gram_jax.pretrain --config=configs/NAME.py:DATA --workdir=DIR

Each process gets JAX_COORDINATOR_ADDRESS (a free port of 127.0.0.1), JAX_NUM_PROCESSES and
JAX_PROCESS_ID (0 to N-1). Standard output is that of process 0; what the others print goes to
standard error, marked "[1] ", "[2] " and so on.
This is for CPUs: each process has one device, or as many as JAX_NUM_CPU_DEVICES says. All GPUs or
TPUs of a machine are best driven by one process, without this script.

SIGTERM and SIGINT (Ctrl-C) are passed on to all. Ends when all processes have ended, with status
  0   all succeeded
  75  told to end by SIGTERM, all have saved their state: the same command goes on from there
  else the status of the process that failed first; the others are stopped within seconds
EOF
}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  usage
  exit 0
fi
if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  usage >&2
  exit 2
fi
count=$1
shift

# Below 32768, where Linux takes no ports for outgoing connections.
port=""
for _ in {1..100}; do
  candidate=$((10000 + RANDOM % 22000))
  # Connecting fails where nobody listens.
  if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
    port=$candidate
    break
  fi
done
if [[ -z "$port" ]]; then
  echo "launch/local.sh: no free port found on 127.0.0.1" >&2
  exit 1
fi
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port"
export JAX_COORDINATOR_BIND_ADDRESS="$JAX_COORDINATOR_ADDRESS" # not on other interfaces
export JAX_NUM_PROCESSES="$count"

# Marks each line of a process. Ends when the process does, whatever signals come before that.
mark() {
  local line
  trap '' INT TERM HUP
  while IFS= read -r line || [[ -n "$line" ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

say() {
  echo "launch/local.sh: $1" >&3
}

# send SIGNAL: to the processes alone; what they started is theirs to end. send SIGNAL -: to that too.
send() {
  local pid
  for pid in "${pids[@]+"${pids[@]}"}"; do
    kill "-$1" -- "${2:-}$pid" || true
  done
}

pipes=$(mktemp -d)
# The shell's own standard error is of no use from here on: it reports jobs that were killed.
exec 3>&2 2>/dev/null
pids=()
readers=()
trap 'send KILL -; rm -rf "$pipes"' EXIT
trap 'send TERM' TERM HUP
trap 'send INT' INT

# Job control: each process leads a group of its own (its children end with it) and hears SIGINT.
set -m
for ((id = 0; id < count; id++)); do
  if ((id == 0)); then
    JAX_PROCESS_ID=0 "$@" </dev/null 2>&3 &
  else
    mkfifo "$pipes/$id"
    mark "$id" <"$pipes/$id" >&3 &
    readers+=($!)
    JAX_PROCESS_ID=$id "$@" </dev/null >"$pipes/$id" 2>&1 &
  fi
  pids+=($!)
done

status=0    # of the process that was the first not to end with 0
deadline="" # seconds since the start of this script; set when a process has failed
stopping=""
running=("${!pids[@]}")
while ((${#running[@]})); do
  left=()
  for id in "${running[@]}"; do
    if kill -0 "${pids[id]}"; then
      left+=("$id")
      continue
    fi
    code=0
    wait "${pids[id]}" || code=$?
    if ((status == 0)); then
      status=$code
    fi
    if ((code == 0 || code == 75)); then
      continue
    fi
    if ((code > 128)) && [[ -z "$stopping" ]]; then
      say "process $id was ended by signal $((code - 128))"
    fi
    if [[ -z "$deadline" ]]; then
      deadline=$((SECONDS + 3)) # for the others to say what they have to say
      failed="process $id ended with status $code"
    fi
  done
  running=("${left[@]+"${left[@]}"}")
  if [[ -n "$deadline" ]] && ((${#running[@]} && SECONDS >= deadline)); then
    if [[ -z "$stopping" ]]; then
      say "$failed; stopping process ${running[*]}"
      stopping=1
      send ABRT # at which Python prints what its threads are doing
      deadline=$((SECONDS + 2))
    else
      send KILL -
    fi
  fi
  sleep 0.1
done
send KILL - # what they left running would keep the pipes open
if ((${#readers[@]})); then
  wait "${readers[@]}"
fi
exit "$status"
