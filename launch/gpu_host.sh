#!/usr/bin/env bash
# Runs the program on the NVIDIA GPUs of this machine: one process drives them all.
#
#   launch/gpu_host.sh [options] VERB [flags of the program]
#   launch/gpu_host.sh rest --gin_file=gin_configs/runs/rest_wmt20_zh_en.gin --gin_file=gin_configs/hardware/gpu.gin
#
# Options (before the verb):
#   --gpus=0,1     which GPUs to use (default: all)
#   --restarts=N   start again up to N times after a preemption or death by a signal (default: 0)
#   --dry-run      print every command and run none
#   --help         print this
# PYTHON names the interpreter (default: python3); settings are in launch/env/gpu.env.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpus=""
restarts=0
while (($#)); do
  case "$1" in
    --gpus=*) gpus="$(value_of "$1")" ;;
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
[[ -z "${gpus}" || "${gpus}" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus=${gpus} is not a list like 0,1"
[[ "${restarts}" =~ ^[0-9]+$ ]] || fail "--restarts=${restarts} is not a number"

if ! ((DRY_RUN)) && ! command -v nvidia-smi >/dev/null; then
  echo "gpu_host.sh: no nvidia-smi: this machine has no NVIDIA driver; launch/local_cpu.sh needs none" >&2
  exit 69
fi
load_environment gpu
if [[ -n "${gpus}" ]]; then
  set_variable CUDA_VISIBLE_DEVICES "${gpus}"
fi
run nvidia-smi --list-gpus
run_again "${restarts}" "${PYTHON}" -m rest_jax.main "$@"
