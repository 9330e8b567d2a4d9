#!/usr/bin/env bash
# deploy.sh on another host, over ssh.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: remote-deploy.sh [options] <dev|prod> <branch> <user@host> [-- OPTION…]

Runs deploy.sh in the checkout on another host, over ssh. What follows -- are options of deploy.sh, such as --gpu.

  --path FOLDER     the checkout there (default: nexus, in the user's home)
  --clone URL       clone it from there, where the folder is not there yet, and make .env from .env.example
  --port PORT       of ssh
  --identity FILE   the key that ssh uses
  --ssh-option O    as ssh's -o; may be repeated
  --help            this text

ssh asks nothing: the host must be known, and let this user in by key. Exit: as deploy.sh; 2 wrong use · 3 something is
missing, here or there · 255 ssh does not get there
HELP
}

main() {
  local folder=nexus clone='' one command
  local -a words options theirs
  words=() options=(-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15) theirs=()
  while [[ $# -gt 0 ]]; do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --path | --clone | --port | --identity | --ssh-option)
        nx_option_value "$1" $#
        case "$1" in
          --path) folder="$2" ;;
          --clone) clone="$2" ;;
          --port) options+=(-p "$2") ;;
          --identity) options+=(-i "$2" -o IdentitiesOnly=yes) ;;
          --ssh-option) options+=(-o "$2") ;;
        esac
        shift
        ;;
      --)
        shift
        theirs=(${@+"$@"})
        break
        ;;
      -*) nx_usage_error "Unknown option $1. Options of deploy.sh follow after --." ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [[ ${#words[@]} -eq 3 ]] || nx_usage_error 'Three words are needed: dev or prod, a branch, and user@host.'
  [[ "${words[0]}" == dev || "${words[0]}" == prod ]] || nx_usage_error "'${words[0]}' is neither dev nor prod."
  case "${words[1]}" in -* | '') nx_usage_error "'${words[1]}' is no branch." ;; esac
  case "${words[2]}" in -* | *[[:space:]]* | '') nx_usage_error "'${words[2]}' is no host." ;; esac
  nx_need ssh 'Install the OpenSSH client.'

  # Quoted here for the shell there, which may be any. A leading ~/ is that user's home.
  folder="${folder#"~/"}"
  command="set -eu; folder=$(quoted "$folder"); "
  if [[ -n "$clone" ]]; then
    command+="if [ ! -e \"\$folder\" ]; then git clone --quiet $(quoted "$clone") \"\$folder\" && cp \"\$folder/.env.example\" \"\$folder/.env\" && chmod 600 \"\$folder/.env\"; fi; "
  fi
  command+="if [ ! -f \"\$folder/deploy/scripts/deploy.sh\" ]; then echo \"There is no checkout of Nexus in \$folder on this host: --path names another one, --clone makes one.\" >&2; exit $NX_MISSING; fi; "
  command+="cd \"\$folder\"; exec bash deploy/scripts/deploy.sh"
  for one in ${theirs[@]+"${theirs[@]}"} "${words[0]}" "${words[1]}"; do
    command+=" $(quoted "$one")"
  done
  nx_step "${words[2]}: deploy.sh ${words[0]} ${words[1]}"
  ssh "${options[@]}" -- "${words[2]}" "sh -c $(quoted "$command")" && return 0
  one="$?"
  [[ "$one" -ne 255 ]] || nx_error "ssh does not get to ${words[2]}: try it by hand, ssh ${words[2]} true"
  exit "$one"
}

# quoted TEXT: within single quotes, for any shell. By sed, since bash 3.2 and later ones read quotes in ${…//…} differently.
quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }

main "$@"
