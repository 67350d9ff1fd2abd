#!/usr/bin/env bash
# Starts N processes of a script on this machine, joined by jax.distributed (also for N = 1).
#
#   train/launch/local.sh 2 -m train.pretrain --config configs/run/demo.yaml mesh.fsdp=2
#
# Process 0 prints and logs. SIGTERM and Ctrl-C reach all of them: they save at the same step and leave; the same command goes on.
# When one fails, the others are stopped. PYTHON names the interpreter (default: that of .venv here, if
# there is one), PORT the coordinator's port (default: a free one).
set -uo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=$1
shift
venv=python
if [ -x .venv/bin/python ]; then venv=.venv/bin/python; fi
python=${PYTHON:-$venv}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i "$python" "$@" &
  pids+=($!)
done
status=0
deadline=0
while ((${#pids[@]} > 0)); do
  sleep 0.2
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if ((code != 0 && status == 0)); then
      status=$code
      deadline=$((SECONDS + 10)) # those that wait for the failed one hear no SIGTERM
    fi
  done
  pids=("${running[@]+"${running[@]}"}")
  if ((status != 0 && ${#pids[@]} > 0)); then
    if ((SECONDS >= deadline)); then kill -KILL "${pids[@]}" 2>/dev/null; else kill -TERM "${pids[@]}" 2>/dev/null; fi
  fi
done
exit "$status"
