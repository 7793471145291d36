#!/usr/bin/env bash
# Runs the program as several processes on this machine, joined by jax.distributed over 127.0.0.1, on the CPU:
# what a pod does, without a pod.
#
#   launch/loopback.sh [options] VERB [flags of the program]
#   launch/loopback.sh --processes=2 rest --gin_file=gin_configs/runs/rest_demo_zh_en.gin '--gin.MODEL_DIR="run"'
#   launch/loopback.sh [options] -- COMMAND [arguments]     another program with the same flags
#
# Options (before the verb):
#   --processes=N   how many processes (default: 2)
#   --devices=N     virtual CPU devices a process (default: 1)
#   --port=P        port of the coordinator (default: a free one)
#   --logs=FOLDER   where processes 1 and up write their output (default: a temporary folder, which is printed)
#   --grace=S       seconds that the others get between SIGTERM and SIGKILL when one has ended (default: 30)
#   --restarts=N    start all again up to N times after a preemption or death by a signal (default: 0)
#   --dry-run       print every command and run none
#   --help          print this
# Process 0 writes to the terminal. If one process fails, the others are ended, and its exit code is returned.
# SIGTERM and Ctrl-C are passed on as SIGTERM, and not followed by a restart.
# PYTHON names the interpreter (default: python3); settings are in launch/env/cpu.env.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2
devices=1
port=""
logs=""
grace=30
restarts=0
command=()
while (($#)); do
  case "$1" in
    --processes=*) processes="$(value_of "$1")" ;;
    --devices=*) devices="$(value_of "$1")" ;;
    --port=*) port="$(value_of "$1")" ;;
    --logs=*) logs="$(value_of "$1")" ;;
    --grace=*) grace="$(value_of "$1")" ;;
    --restarts=*) restarts="$(value_of "$1")" ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      command=("$@")
      break
      ;;
    -*) fail "unknown option $1 (flags of the program come after the verb; see --help)" ;;
    *)
      command=("${PYTHON}" -m rest_jax.main "$@")
      break
      ;;
  esac
  shift
done
((${#command[@]})) || fail "no verb and no command (see --help)"
for number in "${processes}" "${devices}"; do
  [[ "${number}" =~ ^[1-9][0-9]*$ ]] || fail "${number} is not a number of processes or devices"
done
for number in "${grace}" "${restarts}" "${port:-0}"; do
  [[ "${number}" =~ ^[0-9]+$ ]] || fail "${number} is not a whole number"
done

declare -A index_of=() # process id -> process index, of those that run

# Sends a signal to the processes that still run.
signal_all() {
  local pid
  for pid in "${!index_of[@]}"; do
    kill -s "$1" "${pid}" 2>/dev/null || true
  done
}

free_port() {
  "${PYTHON}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_all() {
  local address="127.0.0.1:${port:-$(free_port)}" index
  for ((index = 0; index < processes; index++)); do
    local flags=(--multiprocess "--coordinator_address=${address}"
      "--process_count=${processes}" "--process_index=${index}")
    if ((index == 0)); then
      "${command[@]}" "${flags[@]}" &
    else
      "${command[@]}" "${flags[@]}" >"${logs}/process_${index}.log" 2>&1 &
    fi
    index_of[$!]="${index}"
  done
}

# Waits until a process has ended; sets `finished` to its id and `code` to its exit code.
wait_for_one() {
  while true; do
    for finished in "${!index_of[@]}"; do
      if ! kill -0 "${finished}" 2>/dev/null; then
        code=0
        wait "${finished}" || code=$?
        return
      fi
    done
    sleep 0.1
  done
}

# Ends what still runs: SIGTERM, `grace` seconds, SIGKILL.
end_others() {
  signal_all TERM
  local pid waited=0
  while ((waited < grace * 10)); do
    for pid in "${!index_of[@]}"; do
      kill -0 "${pid}" 2>/dev/null || unset "index_of[${pid}]"
    done
    ((${#index_of[@]})) || return 0
    sleep 0.1
    waited=$((waited + 1))
  done
  signal_all KILL
  index_of=()
}

# Runs all processes to their end; returns 0, or the exit code of the first that failed.
run_processes() {
  local finished code index
  start_all
  while ((${#index_of[@]})); do
    wait_for_one
    index="${index_of[${finished}]}"
    unset "index_of[${finished}]"
    if ((code != 0)); then
      echo "loopback.sh: process ${index} ended with exit code ${code}; ending the others" >&2
      if ((index > 0)); then
        tail -n 20 "${logs}/process_${index}.log" >&2
      fi
      end_others
      return "${code}"
    fi
  done
}

stop() {
  STOPPING=1
  signal_all TERM
}

load_environment cpu
if ((devices > 1)); then
  set_variable XLA_FLAGS "${XLA_FLAGS:+${XLA_FLAGS} }--xla_force_host_platform_device_count=${devices}"
fi
if ((DRY_RUN)); then
  for ((index = 0; index < processes; index++)); do
    printf '%s &\n' "$(shown "${command[@]}" --multiprocess "--coordinator_address=127.0.0.1:${port:-FREE_PORT}" \
      "--process_count=${processes}" "--process_index=${index}")"
  done
  echo "wait"
  exit 0
fi
if [[ -z "${logs}" ]]; then
  logs="$(mktemp -d)"
  echo "loopback.sh: the output of processes 1 and up is in ${logs}" >&2
fi
mkdir -p "${logs}"
trap stop TERM INT
trap 'signal_all KILL' EXIT
run_again "${restarts}" run_processes
