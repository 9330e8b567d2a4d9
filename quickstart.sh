#!/usr/bin/env bash
# From a fresh checkout to an answer: checks, settings, start, and a request that works.
set -euo pipefail
# shellcheck source=deploy/scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/scripts/lib.sh"

usage() {
  cat <<'HELP'
Usage: ./quickstart.sh [options]

Checks this host, makes .env from .env.example where there is none, starts Nexus, waits until it is ready, and sends it a
request. It never changes an .env that is there, but for a key where a first start has none. Repeat it at will.

  --compose     in containers (default where Docker answers)
  --embedded    without Docker: `nexus up -d`, in the background (default elsewhere); `.venv/bin/nexus down` stops it
  --yes         ask nothing
  --no-build    --compose: use the images that are there
  --profile P   --compose: also this profile of docker-compose.yml, such as ollama; may be repeated
  --up "FLAGS"  --embedded: flags for `nexus up`, such as "--no-local-models --port 9000"
  --timeout S   seconds to wait until it is ready (default: 300)
  --help        this text

Exit: 0 it answers · 1 it does not, and why · 2 wrong use · 3 something is missing here
HELP
}

main() {
  local root mode='' timeout_s='' build=true up_flags=''
  local -a profiles
  profiles=()
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  while [[ $# -gt 0 ]]; do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --compose | --embedded) mode="${1#--}" ;;
      --yes | -y) NX_YES=true ;;
      --no-build) build=false ;;
      --profile) nx_option_value "$1" $# && profiles+=(--profile "$2") && shift ;;
      --up) nx_option_value "$1" $# && up_flags="$2" && shift ;;
      --timeout) nx_option_value "$1" $# && timeout_s="$2" && shift ;;
      *) nx_usage_error "Unknown option $1." ;;
    esac
    shift
  done
  cd "$root"
  choose_mode
  [[ "$mode" == compose ]] || embedded_folder
  if [[ "$mode" == compose ]] || ! runs_embedded; then
    [[ "$mode" == compose ]] || embedded_ports
    nx_step "Checking this host (deploy/scripts/preflight-check.sh --$mode)"
    ./deploy/scripts/preflight-check.sh "--$mode" >&2 \
      || nx_die "$NX_FAILED" 'This host is not ready.' 'Fix what failed above, then run ./quickstart.sh again.'
  fi
  if [[ ! -f .env ]]; then
    (umask 077 && cp .env.example .env)
    nx_ok 'made .env from .env.example'
  fi
  if [[ "$mode" == compose ]]; then start_compose; else start_embedded; fi
  try_it
}

choose_mode() {
  [[ -z "$mode" ]] || return 0
  if nx_has docker && docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
    mode=compose
    return 0
  fi
  nx_say 'Docker does not answer here: Nexus can run without, from a Python environment in .venv.'
  nx_confirm 'Start it so?' || nx_die "$NX_FAILED" 'Nothing was started.' \
    'deploy/scripts/install-host-deps.sh installs Docker; ./quickstart.sh --embedded does without.'
  mode=embedded
}

# A host where a gateway already made a key keeps that one.
start_compose() {
  local port
  if [[ -z "$(nx_env_get .env GATEWAY_BEARER_TOKEN)" && ! -e .runtime/gateway ]]; then
    nx_need openssl 'Install openssl.'
    nx_env_set .env GATEWAY_BEARER_TOKEN "$(nx_random_key)"
    chmod 600 .env
    nx_ok 'made a key: GATEWAY_BEARER_TOKEN in .env'
  fi
  nx_step 'Starting containers (the first time, images are built: some minutes)'
  local -a build_flag
  build_flag=(--build)
  [[ "$build" == true ]] || build_flag=()
  docker compose ${profiles[@]+"${profiles[@]}"} up --detach --wait --wait-timeout "${timeout_s:-300}" \
    ${build_flag[@]+"${build_flag[@]}"} >&2 || {
    docker compose ${profiles[@]+"${profiles[@]}"} ps --all >&2 || true
    docker compose ${profiles[@]+"${profiles[@]}"} logs --tail 15 >&2 || true
    nx_die "$NX_FAILED" 'The containers did not become healthy.' 'Above are their last lines; all of them: docker compose logs'
  }
  port="$(docker compose port gateway 8800)"
  url="http://127.0.0.1:${port##*:}"
  key="$(nx_env_get .env GATEWAY_BEARER_TOKEN)"
  if [[ -n "$key" ]]; then
    key_place='GATEWAY_BEARER_TOKEN in .env'
    key_command="\$(sed -n 's/^GATEWAY_BEARER_TOKEN=//p' .env)"
  else
    key="$(docker compose exec -T gateway cat /var/lib/nexus/key | tr -d '\r\n')"
    key_place='.runtime/gateway/key (docker compose exec gateway cat /var/lib/nexus/key)'
    key_command="\$(docker compose exec -T gateway cat /var/lib/nexus/key)"
  fi
  # The port of documentation and metrics is published by docker-compose.dev.yml alone.
  docs_url=''
  stop_words='docker compose down (data stays in .runtime)'
}

# The ports that `nexus up` takes: its flags go before the settings.
embedded_ports() {
  local word before=''
  GATEWAY_PORT="${GATEWAY_PORT:-$(nx_env_get .env GATEWAY_PORT)}"
  OBSERVABILITY_PORT="${OBSERVABILITY_PORT:-$(nx_env_get .env OBSERVABILITY_PORT)}"
  for word in $up_flags; do
    [[ "$before" != --port ]] || GATEWAY_PORT="$word"
    [[ "$before" != --observability-port ]] || OBSERVABILITY_PORT="$word"
    [[ "$word" != --port=* ]] || GATEWAY_PORT="${word#*=}"
    [[ "$word" != --observability-port=* ]] || OBSERVABILITY_PORT="${word#*=}"
    before="$word"
  done
  export GATEWAY_PORT="${GATEWAY_PORT:-8800}" OBSERVABILITY_PORT="${OBSERVABILITY_PORT:-8801}"
}

# The folder of `nexus up`: its flag goes before the variable. Every `nexus` below finds it by the variable.
embedded_folder() {
  local word before=''
  for word in $up_flags; do
    [[ "$before" != --data-dir ]] || NEXUS_DATA_DIR="$word"
    [[ "$word" != --data-dir=* ]] || NEXUS_DATA_DIR="${word#*=}"
    before="$word"
  done
  export NEXUS_DATA_DIR="${NEXUS_DATA_DIR:-.nexus}"
}

# Whether a `nexus up` runs there, no matter who started it; its address in `url`, its key in `key`.
runs_embedded() {
  local said
  [[ -x .venv/bin/nexus ]] || return 1
  said="$(env -u NEXUS_URL -u NEXUS_API_KEY -u NEXUS_API_KEY_FILE -u GATEWAY_BEARER_TOKEN -u GATEWAY_BEARER_TOKEN_FILE \
    .venv/bin/nexus env 2>/dev/null)" || return 1
  url="$(eval "$said" && printf '%s' "${OPENAI_BASE_URL%/v1}")"
  key="$(eval "$said" && printf '%s' "$OPENAI_API_KEY")"
}

# What `nexus up -d` says from `Nexus is up` on holds the key, and stays out of terminals and logs.
start_embedded() {
  local folder_flag=''
  [[ "$NEXUS_DATA_DIR" == .nexus ]] || folder_flag=" --data-dir $NEXUS_DATA_DIR"
  stop_words=".venv/bin/nexus down$folder_flag (data stays in $NEXUS_DATA_DIR)"
  docs_url=''
  if runs_embedded; then
    nx_ok "it runs already, at $url"
  else
    nx_need make 'Debian, Ubuntu: sudo apt install make python3-venv'
    nx_step 'Installing it (the first time about 530 MB are downloaded; Ctrl-C, and starting again, lose nothing)'
    make install >&2 || nx_die "$NX_FAILED" 'Nexus could not be installed.' 'The reason is above. Run ./quickstart.sh again: it goes on where it stopped.'
    nx_step 'Starting it in the background with nexus up -d'
    # shellcheck disable=SC2086 # flags are words
    .venv/bin/nexus up -d $up_flags | sed '/^Nexus is up/,$d' >&2 \
      || nx_die "$NX_FAILED" 'nexus up ended.' "The reason is above; all logs: .venv/bin/nexus logs$folder_flag"
    runs_embedded || nx_die "$NX_FAILED" 'Nexus ended right after its start.' "See: .venv/bin/nexus logs$folder_flag"
    [[ "$OBSERVABILITY_PORT" == 0 ]] || docs_url="http://127.0.0.1:$OBSERVABILITY_PORT/docs"
  fi
  if [[ -s "$NEXUS_DATA_DIR/key" && "$(cat "$NEXUS_DATA_DIR/key")" == "$key" ]]; then
    key_place="$NEXUS_DATA_DIR/key" key_command="\$(cat $NEXUS_DATA_DIR/key)"
  elif [[ "$(nx_env_get .env GATEWAY_BEARER_TOKEN)" == "$key" ]]; then
    key_place='GATEWAY_BEARER_TOKEN in .env' key_command="\$(sed -n 's/^GATEWAY_BEARER_TOKEN=//p' .env)"
  else
    key_place="what .venv/bin/nexus env$folder_flag prints"
    key_command="\$(eval \"\$(.venv/bin/nexus env$folder_flag)\" && echo \"\$OPENAI_API_KEY\")"
  fi
}

try_it() {
  local answer model body said status
  nx_step 'Waiting until it is ready'
  nx_wait_http "$url/readyz" "${timeout_s:-120}" || nx_die "$NX_FAILED" "$url/readyz does not say ready: $(curl -s "$url/readyz" || true)"
  answer="$(curl --silent --show-error --fail --max-time 20 --config <(nx_curl_header Authorization "Bearer $key") "$url/v1/models")" \
    || nx_die "$NX_FAILED" "The key does not open $url/v1/models." "It was taken from $key_place."
  # The first model that chats.
  model="$(printf '%s' "$answer" | nx_json | awk -F '\t' '
    { split($1, part, ".") }
    part[3] == "id" { id[part[2]] = $2 }
    part[3] == "capabilities" && $2 == "\"chat\"" { print id[part[2]]; exit }' | nx_json_text)"
  {
    printf '\nNexus is up.\n\n'
    printf '  URL   %s/v1\n  Key   in %s\n' "$url" "$key_place"
    [[ -z "$docs_url" ]] || printf '  Docs  %s\n' "$docs_url"
    printf '  Stop  %s\n\n' "$stop_words"
  } >&2
  if [[ -z "$model" ]]; then
    nx_say 'No model that chats is up yet. Add a worker: docs/how-to/add-workers.md.'
    return 0
  fi
  body="{\"model\": $(nx_json_string "$model"), \"messages\": [{\"role\": \"user\", \"content\": \"What is gravity?\"}], \"max_tokens\": 50}"
  nx_say 'This is sent to it now, and works from here as it stands:'
  printf '\ncurl %s/v1/chat/completions -H "Authorization: Bearer %s" -H '\''Content-Type: application/json'\'' -d '\''%s'\''\n\n' "$url" "$key_command" "$body"
  said="$(printf '%s' "$body" | curl --silent --show-error --max-time 120 --config <(nx_curl_header Authorization "Bearer $key") \
    --header 'Content-Type: application/json' --data-binary @- --write-out '\n%{http_code}' "$url/v1/chat/completions")" || true
  status="${said##*$'\n'}"
  [[ "$status" == 200 ]] || nx_die "$NX_FAILED" "The request was answered with $status: ${said%$'\n'*}" 'See the logs, and deploy/scripts/verify-gateway.sh.'
  printf '%s\n' "${said%$'\n'*}"
  nx_ok "answered by $model"
}

main "$@"
