#!/usr/bin/env bash
# Write a backup into servers that hold nothing, with gateways and workers stopped meanwhile.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: restore.sh [options] NAME [-- options of `nexus restore`]

Restores the backup NAME, which backup.sh made: checks it, stops gateways and workers, writes it into NATS, etcd and Redis,
and starts again what it stopped. Servers that hold data already are left alone, unless `-- --force` gives that up.

By default in docker compose, from ./.runtime/backups.

  --file FILE      a compose file, as docker compose's -f; may be repeated
  --prod           with docker-compose.prod.yml. With it, here or by --file, as its users that may do so: NATS's and
                   Redis's `admin`, etcd's `root`
  --project NAME   as docker compose's -p
  --local          by the `nexus` of this machine, from --dir, with NATS_URL, ETCD_URL and REDIS_URL from the environment
                   or .env. Gateways and workers must have been stopped
  --dir DIR        with --local: where the folder NAME lies (default: ./backups)
  --yes            do not ask before gateways and workers are stopped
  --help           this text

Options of `nexus restore`: --force · --only etcd,redis,streams · --replicas N (streams in a NATS cluster of another size)

Exit: 0 done · 1 it did not work · 2 wrong use · 3 docker or nexus is missing

  restore.sh nexus-20261125T030000Z
  restore.sh --yes nexus-20261125T030000Z -- --force
HELP
}

files=() words=() more=() local_=false folder=./backups
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --file | -f) nx_option_value "$1" $# && files+=(-f "$2") && shift 2 ;;
    --prod)
      files+=(-f docker-compose.yml -f docker-compose.prod.yml)
      shift
      ;;
    --project | -p) nx_option_value "$1" $# && files+=(-p "$2") && shift 2 ;;
    --local) local_=true && shift ;;
    --dir) nx_option_value "$1" $# && folder="$2" && shift 2 ;;
    --yes | -y) NX_YES=true && shift ;;
    --) shift && more=("$@") && break ;;
    -*) nx_usage_error "Unknown option $1." ;;
    *) words+=("$1") && shift ;;
  esac
done
[[ ${#words[@]} -eq 1 ]] || nx_usage_error 'Say which backup: NAME.'
name="${words[0]}"
case "$name" in
  */* | .* | '') nx_usage_error "'$name' is no name of a folder: no slashes, no dot at its beginning." ;;
esac

if [[ "$local_" == true ]]; then
  nx_need nexus 'Put the .venv/bin of a checkout on PATH, or install a release (pip install nexus-inference-gateway), or leave --local out where docker compose runs it.'
  nexus restore "$folder/$name" ${more[@]+"${more[@]}"} || exit "$NX_FAILED"
  exit 0
fi

nx_need docker 'Install Docker, or use --local.'
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
nx_prod_identity ${files[@]+"${files[@]}"}
compose() { docker compose ${files[@]+"${files[@]}"} "$@"; }
in_gateway() { compose run --rm -T --no-deps ${NX_IDENTITY[@]+"${NX_IDENTITY[@]}"} -v "$PWD/.runtime/backups:/backups" gateway "$@"; }

in_gateway backup --verify --quiet "/backups/$name" || nx_die "$NX_FAILED" "$name cannot be restored." 'Nothing was changed.'
stopped=()
while IFS= read -r service; do
  case "$service" in
    gateway | worker | worker-*) stopped+=("$service") ;;
  esac
done < <(compose ps --services --status running)
if [[ ${#stopped[@]} -gt 0 ]]; then
  nx_confirm "Stop ${stopped[*]} while $name is restored?" || nx_die "$NX_FAILED" 'Not agreed to; nothing was changed.'
  compose stop "${stopped[@]}"
fi
start_again() {
  [[ ${#stopped[@]} -eq 0 ]] || compose start "${stopped[@]}" || nx_warn "Start these yourself: ${stopped[*]}"
}
compose up -d --wait nats etcd redis
code=0
in_gateway restore "/backups/$name" ${more[@]+"${more[@]}"} || code=$?
case "$code" in
  0) ;;
  1 | 2)
    nx_error 'Not restored; nothing was changed.'
    start_again
    exit "$code"
    ;;
  *) nx_die "$NX_FAILED" 'Restored in part.' 'Gateways and workers stay stopped: mend the cause, and repeat with -- --force.' ;;
esac
start_again
nx_ok "$name is restored."
