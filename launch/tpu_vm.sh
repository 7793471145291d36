#!/usr/bin/env bash
# Runs the program on a Cloud TPU VM slice: asks for it through queued resources, installs this source on all
# of its hosts, and starts the same command on every one.
#
#   launch/tpu_vm.sh ACTION --name=NAME [options] [VERB flags of the program]
#   launch/tpu_vm.sh up  --name=rest --zone=us-east5-b --accelerator-type=v6e-16 --spot
#   launch/tpu_vm.sh run --name=rest --zone=us-east5-b rest --gin_file=gin_configs/runs/rest_wmt20_zh_en.gin
#
# Actions:
#   create    ask for the slice
#   wait      wait until it is ACTIVE; fails if it never can be
#   install   copy the source and install it on all hosts
#   up        create, wait and install
#   run       start a verb on all hosts (with --detach: in the background, output in ~/rest_jax/run.log)
#   logs      the last lines of a detached run on each host
#   stop      SIGTERM to a detached run: it saves and ends
#   status    the state of the request
#   delete    give the slice back
# Options:
#   --name=NAME               name of the slice and of its request
#   --zone=ZONE, --project=P  where (default: gcloud's own settings)
#   --accelerator-type=T      for instance v6e-16, v5litepod-16, v4-32 (create, up)
#   --runtime-version=R       software of the VM (create, up; default: v2-alpha-tpuv6e)
#   --spot                    a slice that can be taken away (create, up)
#   --valid-until=DURATION    withdraw the request if it was not met by then (create, up), for instance 6h
#   --python=V                Python on the hosts, 3.11 or later (install, up; default: 3.12)
#   --poll=S                  seconds between two looks at the state (wait, up; default: 30)
#   --detach                  see run
#   --dry-run                 print every command and run none
#   --help                    print this
# MODEL_DIR must be a folder that all hosts see under the same path. Settings are in launch/env/tpu.env.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=""
name=""
where=()
accelerator=""
runtime="v2-alpha-tpuv6e"
request=()
python_version="3.12"
poll=30
detach=0
while (($#)); do
  case "$1" in
    --name=*) name="$(value_of "$1")" ;;
    --zone=* | --project=*) where+=("$1") ;;
    --accelerator-type=*) accelerator="$(value_of "$1")" ;;
    --runtime-version=*) runtime="$(value_of "$1")" ;;
    --spot) request+=(--spot) ;;
    --valid-until=*) request+=("--valid-until-duration=$(value_of "$1")") ;;
    --python=*) python_version="$(value_of "$1")" ;;
    --poll=*) poll="$(value_of "$1")" ;;
    --detach) detach=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*) fail "unknown option $1 (flags of the program come after the verb; see --help)" ;;
    *)
      # The first word is the action; what follows the second, the verb, is the program's.
      if [[ -n "${action}" ]]; then
        break
      fi
      action="$1"
      ;;
  esac
  shift
done
[[ -n "${action}" ]] || fail "no action (see --help)"
[[ "${name}" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=${name} is not a name (small letters, digits, -)"
[[ "${poll}" =~ ^[0-9]+$ ]] || fail "--poll=${poll} is not a number of seconds"
[[ "${action}" == run ]] || (($# == 0)) || fail "$1: only run takes a verb"
if ! ((DRY_RUN)) && ! command -v gcloud >/dev/null; then
  echo "tpu_vm.sh: no gcloud; install the Google Cloud CLI and log in" >&2
  exit 69
fi

queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

on_all_hosts() {
  run "${vm[@]}" ssh "${name}" "${where[@]}" --worker=all "--command=$1"
}

create() {
  [[ -n "${accelerator}" ]] || fail "--accelerator-type is needed, for instance v6e-16"
  run "${queue[@]}" create "${name}" "--node-id=${name}" "${where[@]}" \
    "--accelerator-type=${accelerator}" "--runtime-version=${runtime}" "${request[@]}"
}

state() {
  run "${queue[@]}" describe "${name}" "${where[@]}" '--format=value(state.state)'
}

wait_until_active() {
  if ((DRY_RUN)); then
    state
    echo "# every ${poll} s, until it says ACTIVE"
    return
  fi
  local now
  while true; do
    now="$(state)"
    echo "$(date '+%H:%M:%S') ${name}: ${now}" >&2
    case "${now}" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "tpu_vm.sh: ${name} is ${now}; delete it, and create it again" >&2
        return "${PREEMPTED}"
        ;;
      *) sleep "${poll}" ;;
    esac
  done
}

install_source() {
  local archive
  archive="${TMPDIR:-/tmp}/rest_jax-${name}.tar.gz"
  run tar --create --gzip --file "${archive}" --directory "$(dirname "${LAUNCH_DIR}")" \
    --exclude='*.egg-info' --exclude=__pycache__ \
    rest_jax gin_configs launch setup.py pyproject.toml README.md LICENSE
  run "${vm[@]}" scp "${archive}" "${name}:rest_jax.tar.gz" "${where[@]}" --worker=all
  run rm -f "${archive}"
  # The VM's own Python is older than the program needs; uv brings one.
  on_all_hosts "set -e; mkdir -p ~/rest_jax; tar -xzf ~/rest_jax.tar.gz -C ~/rest_jax; cd ~/rest_jax; \
python3 -m pip install --quiet --user uv; \
~/.local/bin/uv venv --quiet --allow-existing --python ${python_version} ~/rest_jax_env; \
~/.local/bin/uv pip install --quiet --python ~/rest_jax_env/bin/python --editable '.[tpu]'"
}

run_verb() {
  (($#)) || fail "run: no verb (see --help)"
  local program setting="cd ~/rest_jax && source launch/env/tpu.env"
  program="../rest_jax_env/bin/python -m rest_jax.main $(shown "$@" --multiprocess)"
  if ((detach)); then
    on_all_hosts "${setting} && { nohup ${program} >run.log 2>&1 </dev/null & echo \$! >run.pid; }"
  else
    on_all_hosts "${setting} && ${program}"
  fi
}

case "${action}" in
  create) create ;;
  wait) wait_until_active ;;
  install) install_source ;;
  up)
    create
    wait_until_active
    install_source
    ;;
  run) run_verb "$@" ;;
  logs) on_all_hosts 'tail -n 20 ~/rest_jax/run.log' ;;
  stop) on_all_hosts 'xargs kill -s TERM <~/rest_jax/run.pid' ;;
  status) run "${queue[@]}" describe "${name}" "${where[@]}" ;;
  delete) run "${queue[@]}" delete "${name}" "${where[@]}" --force --quiet ;;
  *) fail "unknown action ${action} (see --help)" ;;
esac
