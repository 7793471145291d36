#!/usr/bin/env bash
# Runs the program on this machine's CPU.
#
#   launch/local_cpu.sh [options] VERB [flags of the program]
#   launch/local_cpu.sh rest --gin_file=gin_configs/runs/rest_demo_zh_en.gin '--gin.MODEL_DIR="run"'
#
# Options (before the verb):
#   --devices=N    virtual CPU devices, to try a mesh (default: 1)
#   --restarts=N   start again up to N times after a preemption or death by a signal (default: 0)
#   --dry-run      print every command and run none
#   --help         print this
# PYTHON names the interpreter (default: python3); settings are in launch/env/cpu.env.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

devices=1
restarts=0
while (($#)); do
  case "$1" in
    --devices=*) devices="$(value_of "$1")" ;;
    --restarts=*) restarts="$(value_of "$1")" ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*) fail "unknown option $1 (flags of the program come after the verb; see --help)" ;;
    *) break ;;
  esac
  shift
done
(($#)) || fail "no verb (see --help)"
[[ "${devices}" =~ ^[1-9][0-9]*$ ]] || fail "--devices=${devices} is not a number of devices"
[[ "${restarts}" =~ ^[0-9]+$ ]] || fail "--restarts=${restarts} is not a number"

load_environment cpu
if ((devices > 1)); then
  set_variable XLA_FLAGS "${XLA_FLAGS:+${XLA_FLAGS} }--xla_force_host_platform_device_count=${devices}"
fi
run_again "${restarts}" "${PYTHON}" -m rest_jax.main "$@"
