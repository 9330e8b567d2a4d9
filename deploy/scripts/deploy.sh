#!/usr/bin/env bash
# Bring this host's Nexus to a branch: fetch, build, replace what changed, verify; back to what was where that fails.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: deploy.sh [options] <dev|prod> <branch>

Brings the Nexus of this checkout to the newest revision of a branch, with docker compose. Nothing is touched while the
checkout has changes of its own. What has not changed keeps running; workers drain, gateways behind the load balancer are
replaced one after the other. Then verify-gateway.sh asks for everything; where it fails, the revision before is put back.

  dev    docker-compose.yml, docker-compose.dev.yml
  prod   docker-compose.yml, docker-compose.scale.yml, docker-compose.prod.yml

  --gpu               also docker-compose.gpu.yml
  --file FILE         also this compose file; may be repeated
  --scale NAME=N      so many of a service, such as gateway=3 or worker=2; may be repeated (default: as many as run)
  --pull              images come from a registry (NEXUS_IMAGE_PREFIX, NEXUS_VERSION); nothing is built
  --no-build          the images are here already
  --backup            first back up all data, with backup.sh, into .runtime/backups
  --remote NAME       the git remote (default: origin)
  --url URL           where the gateway is reached (default: its published port on 127.0.0.1)
  --cacert FILE       authority of that URL's certificate
  --timeout SECONDS   for containers to become healthy (default: 300)
  --no-verify         do not ask for everything at the end; readiness counts
  --dry-run           say what would be done
  --help              this text

Exit: 0 deployed, or there was nothing to do · 1 failed, the revision before runs again (or it is said that it does not) ·
2 wrong use · 3 something is missing here
HELP
}

# All of it is a function: git may replace this file while it runs, and bash reads as it goes.
main() {
  local root environment='' branch='' remote=origin backup=false url='' timeout_s=300 build=true pull=false verify=true dry=false gpu=false
  local -a extra scales words tls
  extra=() scales=() words=() tls=()
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
  while [[ $# -gt 0 ]]; do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --gpu) gpu=true ;;
      --pull) pull=true build=false ;;
      --no-build) build=false ;;
      --no-verify) verify=false ;;
      --dry-run) dry=true ;;
      --backup) backup=true ;;
      --file | --scale | --remote | --url | --timeout | --cacert)
        nx_option_value "$1" $#
        case "$1" in
          --file) extra+=("$2") ;;
          --scale) scales+=("$2") ;;
          --remote) remote="$2" ;;
          --url) url="$2" ;;
          --timeout) timeout_s="$2" ;;
          --cacert) tls=(--cacert "$2") ;;
        esac
        shift
        ;;
      -*) nx_usage_error "Unknown option $1." ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [[ ${#words[@]} -eq 2 ]] || nx_usage_error 'Two words are needed: dev or prod, and a branch.'
  environment="${words[0]}" branch="${words[1]}"
  [[ "$environment" == dev || "$environment" == prod ]] || nx_usage_error "'$environment' is neither dev nor prod."
  [[ "$branch" != -* ]] || nx_usage_error "'$branch' is no branch."
  cd "$root"
  nx_need git 'Install git.'
  nx_need docker 'deploy/scripts/install-host-deps.sh installs it.'

  local before before_name target
  check_tree
  find_target
  nx_step "$environment: $before_name (${before:0:12}) → $branch (${target:0:12})"
  if [[ "$dry" == true ]]; then
    say_plan
    exit 0
  fi
  back_up
  go_to "$target"
  if ! bring_up; then
    go_back
    exit "$NX_FAILED"
  fi
  nx_ok "$environment runs $branch at $(git rev-parse --short=12 HEAD)"
}

check_tree() {
  git rev-parse --is-inside-work-tree >/dev/null 2>&1 || nx_die "$NX_MISSING" "$root is no git checkout." 'git clone the repository, and deploy from there.'
  local changes
  changes="$(git status --porcelain)"
  if [[ -n "$changes" ]]; then
    printf '%s\n' "$changes" | head -n 10 >&2
    nx_die "$NX_FAILED" 'This checkout has changes that are in no commit.' 'Commit them, or put them aside: git stash --include-untracked. Settings belong into .env, which git ignores.'
  fi
  before="$(git rev-parse HEAD)"
  before_name="$(git symbolic-ref --quiet --short HEAD || echo detached)"
}

find_target() {
  nx_step "Fetching $remote"
  git remote get-url "$remote" >/dev/null 2>&1 || nx_die "$NX_MISSING" "There is no git remote $remote." 'Name another one: --remote NAME'
  GIT_TERMINAL_PROMPT=0 git fetch --quiet --prune "$remote" || nx_die "$NX_FAILED" "$remote cannot be fetched." 'Is it reachable, and may this user read it?'
  target="$(git rev-parse --verify --quiet "refs/remotes/$remote/$branch^{commit}")" \
    || nx_die "$NX_FAILED" "$remote has no branch $branch." "Its branches: $(git for-each-ref --format='%(refname:strip=3)' "refs/remotes/$remote" | grep -vx HEAD | head -n 20 | tr '\n' ' ')"
  # Commits that only this checkout has would be lost from what runs.
  if git rev-parse --verify --quiet "refs/heads/$branch" >/dev/null && ! git merge-base --is-ancestor "refs/heads/$branch" "$target"; then
    nx_die "$NX_FAILED" "The local branch $branch has commits that $remote/$branch does not have." "Push them, or throw them away: git branch --force $branch $remote/$branch"
  fi
}

# The compose files of the environment, as they are in the revision that is checked out; each with -f, in FILES.
set_files() {
  local one
  FILES=(-f docker-compose.yml)
  case "$environment" in
    dev) FILES+=(-f docker-compose.dev.yml) ;;
    prod) FILES+=(-f docker-compose.scale.yml -f docker-compose.prod.yml) ;;
  esac
  [[ "$gpu" == false ]] || FILES+=(-f docker-compose.gpu.yml)
  for one in ${extra[@]+"${extra[@]}"}; do FILES+=(-f "$one"); done
  for one in "${FILES[@]}"; do
    [[ "$one" == -f || -f "$one" ]] || { nx_error "$one is not in this revision." && return 1; }
  done
}

compose() { docker compose "${FILES[@]}" "$@"; }

say_plan() {
  local -a FILES
  set_files || true
  nx_say "$(git rev-list --count "$before..$target") commits forward, $(git rev-list --count "$target..$before") back:"
  git log --oneline --max-count 15 "$before..$target" >&2
  nx_say "compose files: ${FILES[*]}"
  [[ "$build" == false ]] || nx_say 'images would be built'
  [[ "$pull" == false ]] || nx_say 'images would be pulled'
}

# With the compose files of what runs now.
back_up() {
  local -a FILES
  if [[ "$backup" == true ]]; then
    set_files || exit "$NX_FAILED"
    nx_step 'Backing up'
    ./deploy/scripts/backup.sh "${FILES[@]}" >&2 || nx_die "$NX_FAILED" 'The backup failed: nothing was deployed.'
  elif [[ "$environment" == prod ]]; then
    nx_warn 'Nothing is backed up first. --backup does it: the way back puts programs back, not data.'
  fi
}

go_to() {
  if [[ "$(git rev-parse HEAD)" == "$1" && "$before_name" == "$branch" ]]; then return 0; fi
  git checkout --quiet -B "$branch" "$1"
  git branch --quiet --set-upstream-to "$remote/$branch" "$branch" 2>/dev/null || true
}

# Everything, for the revision that is checked out. Status 1 where it does not work.
bring_up() {
  local -a FILES servers
  local service
  servers=()
  set_files || return 1
  NEXUS_REVISION="$(git rev-parse HEAD)"
  export NEXUS_REVISION
  local -a asked
  asked=(--compose)
  [[ "$environment" != prod ]] || asked+=(--prod)
  [[ "$gpu" == false ]] || asked+=(--gpu)
  ./deploy/scripts/preflight-check.sh "${asked[@]}" >&2 || return 1
  compose config --quiet || return 1
  if [[ "$pull" == true ]]; then
    nx_step 'Pulling images'
    compose pull --quiet || return 1
  elif [[ "$build" == true ]]; then
    nx_step 'Building images'
    compose build --quiet || return 1
  fi
  nx_step 'Replacing what changed'
  # Servers first; then gateways, which read what earlier workers send; what stands before gateways last.
  for service in $(services_like servers); do servers+=("$service"); done
  if [[ ${#servers[@]} -gt 0 ]]; then
    compose up --detach --wait --wait-timeout "$timeout_s" "${servers[@]}" >&2 || { show_trouble && return 1; }
  fi
  for service in $(services_like steps); do
    compose run --rm --no-deps -T "$service" >&2 </dev/null || { nx_error "$service failed." && return 1; }
  done
  for service in $(services_like gateways) $(services_like workers); do
    replace "$service" || return 1
  done
  for service in $(services_like balancers); do
    compose up --detach --no-deps --wait --wait-timeout "$timeout_s" "$service" >&2 || { show_trouble "$service" && return 1; }
  done
  verify_it
}

# services_like servers|steps|workers|gateways|balancers. What only prepares others, and ends, starts as the dependency of
# a server; steps are such that only workers and gateways wait for.
services_like() {
  local kind="$1" all waited once
  all="$(compose config --services)"
  # A line WHO<TAB>WHAT for each that waits for another's end.
  waited="$(compose config --format json | nx_json \
    | awk -F '\t' '$2 == "\"service_completed_successfully\"" { split($1, part, "."); print part[2] "\t" part[4] }')"
  once="$(printf '%s\n' "$waited" | cut -f2 | sort -u)"
  all="$(printf '%s\n' "$all" | grep -vxF "${once:-.}")"
  case "$kind" in
    servers) printf '%s\n' "$all" | grep -vE 'worker|gateway|caddy|balancer' || true ;;
    steps)
      waited="$(printf '%s\n' "$waited" | awk -F '\t' '$1 !~ /worker|gateway|caddy|balancer/ { print $2 }' | sort -u)"
      printf '%s\n' "$once" | grep . | grep -vxF "${waited:-.}" || true
      ;;
    workers) printf '%s\n' "$all" | grep worker || true ;;
    gateways) printf '%s\n' "$all" | grep gateway || true ;;
    balancers) printf '%s\n' "$all" | grep -E 'caddy|balancer' || true ;;
  esac
}

wanted_count() {
  local one
  for one in ${scales[@]+"${scales[@]}"}; do
    if [[ "${one%%=*}" == "$1" ]]; then
      echo "${one#*=}"
      return 0
    fi
  done
  echo ''
}

# stale SERVICE COUNT: its containers that compose would replace, since their image or configuration is another one.
stale() {
  docker compose --dry-run "${FILES[@]}" up --detach --no-deps --scale "$1=$2" "$1" 2>&1 \
    | sed -nE 's/^.*Container ([^ ]+) +Recreate$/\1/p'
}

# A service that publishes no port can have its successors beside it first: nothing is away at any time. Others are
# replaced in place.
replace() {
  local service="$1" old running wanted id
  running="$(compose ps --quiet "$service" | awk 'END { print NR }')"
  wanted="$(wanted_count "$service")"
  wanted="${wanted:-$([[ "$running" -gt 0 ]] && echo "$running" || echo 1)}"
  old="$(stale "$service" "$running")" || return 1
  if [[ -z "$old" && "$running" -eq "$wanted" ]]; then
    nx_say "$service: unchanged"
    return 0
  fi
  if [[ -z "$old" || "$running" -eq 0 ]] || ! can_double "$service"; then
    compose up --detach --no-deps --wait --wait-timeout "$timeout_s" --scale "$service=$wanted" "$service" >&2 || { show_trouble "$service" && return 1; }
    return 0
  fi
  nx_say "$service: $wanted new beside the old, then the old leave"
  compose up --detach --no-deps --no-recreate --wait --wait-timeout "$timeout_s" \
    --scale "$service=$((running + wanted))" "$service" >&2 || { show_trouble "$service" && return 1; }
  printf '%s\n' "$old" | while IFS= read -r id; do
    docker stop "$id" >/dev/null
    docker rm "$id" >/dev/null
  done
  compose up --detach --no-deps --no-recreate --scale "$service=$wanted" "$service" >&2 || return 1
}

can_double() {
  local id
  id="$(compose ps --quiet "$1" | head -n 1)"
  # A port can be published once; a worker's name can be given once.
  [[ -z "$(docker inspect --format '{{range $port, $at := .HostConfig.PortBindings}}{{$port}}{{end}}' "$id")" ]] \
    && ! docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$id" | grep -qE '^WORKER_NAME=.'
}

show_trouble() {
  compose ps --all ${1+"$1"} >&2 || true
  compose logs --tail 15 ${1+"$1"} >&2 || true
}

published_url() {
  local service address said
  for service in caddy balancer loadbalancer gateway; do
    for address in 443:https 8443:https 8800:http 80:http 8080:http; do
      if said="$(compose port "$service" "${address%%:*}" 2>/dev/null)" && [[ -n "$said" && "${said##*:}" != 0 ]]; then
        printf '%s://127.0.0.1:%s\n' "${address##*:}" "${said##*:}"
        return 0
      fi
    done
  done
}

verify_it() {
  local said='' key
  url="${url:-$(published_url)}"
  [[ -n "$url" ]] || { nx_error 'No published port was found: give --url URL.' && return 1; }
  nx_step "Verifying $url"
  nx_wait_http "$url/readyz" 60 ${tls[@]+"${tls[@]}"} || { nx_error "$url/readyz does not say ready." && show_trouble gateway && return 1; }
  [[ "$verify" == true ]] || return 0
  key="$(nx_env_get .env GATEWAY_BEARER_TOKEN)"
  key="${GATEWAY_BEARER_TOKEN:-$key}"
  [[ -n "$key" ]] || key="$(compose exec -T gateway cat /var/lib/nexus/key 2>/dev/null | tr -d '\r\n')" || key=''
  [[ -n "$key" ]] || { nx_error 'No key was found to verify with: set GATEWAY_BEARER_TOKEN, or use --no-verify.' && return 1; }
  NEXUS_API_KEY="$key" ./deploy/scripts/verify-gateway.sh ${tls[@]+"${tls[@]}"} --wait 30 "$url" >&2
}

# The revision before, under the name that it had.
go_back() {
  if [[ "$(git rev-parse HEAD)" == "$before" ]]; then
    nx_error "It does not work, and there is no other revision to go back to: $before_name at ${before:0:12} is what was here before."
    return 0
  fi
  nx_step "It does not work: back to $before_name at ${before:0:12}"
  if [[ "$before_name" == detached ]]; then
    git checkout --quiet --detach "$before"
  else
    git checkout --quiet -B "$before_name" "$before"
  fi
  if bring_up; then
    nx_error "$branch at ${target:0:12} does not work here: $before_name at ${before:0:12} runs again. Data was not put back."
  else
    nx_error "$branch at ${target:0:12} does not work here, and going back to $before_name at ${before:0:12} failed as well: look at docker compose ps."
  fi
}

main "$@"
exit
