#!/usr/bin/env bash
# Save all that a Nexus holds into a folder of its own, while everything runs.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: backup.sh [options] [NAME] [-- options of `nexus backup`]

Saves jobs, results, files, keys, aliases, services and all else that etcd, NATS and Redis hold, by `nexus backup`, and
compares what was written with its manifest. Nothing is stopped. NAME is the new folder (default: nexus-<UTC time>).

By default in docker compose: the gateway's image runs once beside the running services, and the folder lies in
./.runtime/backups, which the containers' user owns. It holds prompts, answers and secrets in the open: copy it to a safe
place, as root or as that user.

  --file FILE      a compose file, as docker compose's -f; may be repeated (default: as docker compose finds them)
  --prod           with docker-compose.prod.yml. With it, here or by --file, as its users that may do so: NATS's and
                   Redis's `admin`, etcd's `root`
  --project NAME   as docker compose's -p
  --local          by the `nexus` of this machine, with NATS_URL, ETCD_URL and REDIS_URL from the environment or .env;
                   the folder lies in --dir
  --dir DIR        with --local: where the folder is made (default: ./backups)
  --help           this text

Exit: 0 done · 1 it did not work, nothing was saved · 2 wrong use · 3 docker or nexus is missing

  backup.sh                                  every night, say by cron
  backup.sh --prod
  backup.sh --local --dir /mnt/backups -- --only redis
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
    --) shift && more=("$@") && break ;;
    -*) nx_usage_error "Unknown option $1." ;;
    *) words+=("$1") && shift ;;
  esac
done
[[ ${#words[@]} -le 1 ]] || nx_usage_error 'One NAME at most.'
name="${words[0]:-nexus-$(date -u +%Y%m%dT%H%M%SZ)}"
case "$name" in
  */* | .* | '') nx_usage_error "'$name' is no name of a folder: no slashes, no dot at its beginning." ;;
esac

if [[ "$local_" == true ]]; then
  nx_need nexus 'Put the .venv/bin of a checkout on PATH, or install a release (pip install nexus-inference-gateway), or leave --local out where docker compose runs it.'
  mkdir -p "$folder"
  nexus backup "$folder/$name" ${more[@]+"${more[@]}"} || nx_die "$NX_FAILED" 'The backup failed; nothing was saved.'
  nexus backup --verify --quiet "$folder/$name"
  nx_ok "$folder/$name is complete."
  exit 0
fi

nx_need docker 'Install Docker, or use --local.'
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
nx_prod_identity ${files[@]+"${files[@]}"}
in_gateway() { docker compose ${files[@]+"${files[@]}"} run --rm -T --no-deps ${NX_IDENTITY[@]+"${NX_IDENTITY[@]}"} -v "$PWD/.runtime/backups:/backups" gateway "$@"; }
docker compose ${files[@]+"${files[@]}"} run --rm -T --no-deps folders /runtime/backups >/dev/null
in_gateway backup "/backups/$name" ${more[@]+"${more[@]}"} \
  || nx_die "$NX_FAILED" 'The backup failed; nothing was saved.' 'Are nats, etcd and redis up? docker compose ps'
in_gateway backup --verify --quiet "/backups/$name"
nx_ok ".runtime/backups/$name is complete."
