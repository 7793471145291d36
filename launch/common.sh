# shellcheck shell=bash
# What the launch scripts share; sourced, not run. Every command goes through `run`, so that --dry-run prints
# exactly what would be done.

if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
  echo "bash 4.4 or later is needed; this is ${BASH_VERSION}" >&2
  exit 69
fi

LAUNCH_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
DRY_RUN=0
STOPPING=0 # set by a script's trap: whoever asked to stop does not want a restart

# The program's exit code for "told to stop, saved, start me again"; 128 and above is death by a signal.
PREEMPTED=42
USAGE_ERROR=64

# Prints the comment at the head of a script.
usage() {
  sed -n '2,/^$/{s/^# \{0,1\}//p}' "$1"
}

fail() {
  echo "$(basename "$0"): $1" >&2
  exit "${USAGE_ERROR}"
}

# The value of an argument --name=value.
value_of() {
  printf '%s' "${1#*=}"
}

# A command as one could type it: quoted only where the shell needs it.
shown() {
  local word separator=""
  for word in "$@"; do
    if [[ "${word}" =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      printf '%s%s' "${separator}" "${word}"
    else
      printf "%s'%s'" "${separator}" "${word//\'/\'\\\'\'}"
    fi
    separator=" "
  done
  printf '\n'
}

# Runs a command, or prints it.
run() {
  if ((DRY_RUN)); then
    shown "$@"
  else
    "$@"
  fi
}

# Exports the settings of launch/env/NAME.env; a variable that is already set keeps its value.
load_environment() {
  if ((DRY_RUN)); then
    shown source "${LAUNCH_DIR}/env/$1.env"
  fi
  # shellcheck source=/dev/null
  source "${LAUNCH_DIR}/env/$1.env"
}

# Exports a variable, or prints the export.
set_variable() {
  if ((DRY_RUN)); then
    shown export "$1=$2"
  fi
  export "$1=$2"
}

# Whether the same command should be started again after this exit code.
is_retryable() {
  (($1 == PREEMPTED || $1 >= 128))
}

# run_again RESTARTS COMMAND...: runs a command, and again while its exit code asks for that.
run_again() {
  local restarts="$1" attempt=0 code
  shift
  while true; do
    code=0
    run "$@" || code=$?
    if ((code == 0 || STOPPING)) || ! is_retryable "${code}" || ((attempt >= restarts)); then
      return "${code}"
    fi
    attempt=$((attempt + 1))
    echo "exit code ${code}: starting again (${attempt} of ${restarts})" >&2
  done
}
