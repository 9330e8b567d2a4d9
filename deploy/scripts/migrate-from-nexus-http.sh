#!/usr/bin/env bash
# From the HTTP-proxying Nexus to this one: settings, aliases and service records.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: migrate-from-nexus-http.sh [options] OLD-FOLDER

Carries over what the Nexus that proxied HTTP was configured with, whose checkout is OLD-FOLDER: its .env, its model
aliases, and the services in its etcd. Each line of the report says what became of one thing. Without --apply nothing is
changed. What was carried over already is left as it is, so that it can be repeated: first for .env, and once the new
Nexus runs, for aliases and services. The old Nexus is only read.

  --apply            do it; an .env that is there is kept beside it, as .env.before-migration-<time>
  --env FILE         the new settings (default: .env at this repository's root)
  --aliases FILE     the old aliases (default: MODEL_ALIASES_JSON, else model_aliases.json where the old Nexus kept it)
  --old-etcd URL     etcd of the old Nexus, read under its ETCD_PREFIX (default: services are taken from its .env alone)
  --gateway URL      the running new gateway that takes aliases and services; an admin key from --key-file or NEXUS_API_KEY
  --key-file FILE    holds the key
  --etcd URL         in the place of --gateway: the new etcd itself; options for it as in register-service.sh
  --force            also replace aliases and services that are there with other values
  --help             this text

The report's words:
  carried   as it was             changed   under another name or with another value
  there     already so            left      has no counterpart here, and why; or needs you
  worker    an inference server: the command that serves it

Secrets are never printed. Needs bash, curl and openssl. Exit: 0 done · 1 something could not be written · 2 wrong use ·
3 something is missing

  migrate-from-nexus-http.sh ~/nexus-old                       # what would happen
  migrate-from-nexus-http.sh --apply ~/nexus-old && ./quickstart.sh
  NEXUS_API_KEY=… migrate-from-nexus-http.sh --apply --gateway http://127.0.0.1:8800 --old-etcd http://127.0.0.1:2379 ~/nexus-old
HELP
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
apply=false force=false env_file="$root/.env" aliases_file='' old_etcd='' gateway='' new_etcd='' key="${NEXUS_API_KEY:-}" old=''
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --apply) apply=true && shift && continue ;;
    --force) force=true && shift && continue ;;
    --env | --aliases | --old-etcd | --gateway | --etcd | --key-file) nx_option_value "$1" $# ;;
    -*)
      nx_etcd_option "$@" || nx_usage_error "Unknown option $1."
      shift 2
      continue
      ;;
    *)
      [[ -z "$old" ]] || nx_usage_error 'One folder is needed.'
      old="$1" && shift && continue
      ;;
  esac
  case "$1" in
    --env) env_file="$2" ;;
    --aliases) aliases_file="$2" ;;
    --old-etcd) old_etcd="$2" ;;
    --gateway) gateway="${2%/}" ;;
    --etcd) new_etcd="$2" ;;
    --key-file)
      [[ -r "$2" ]] || nx_die "$NX_MISSING" "The key file $2 cannot be read."
      key="$(tr -d '\r\n' <"$2")"
      ;;
  esac
  shift 2
done
[[ -n "$old" ]] || nx_usage_error "The old Nexus's folder is needed."
old_env="$old/.env"
[[ -f "$old_env" ]] || nx_die "$NX_MISSING" "$old_env is not there." 'Name the folder of the old checkout, in which its .env is.'
[[ -z "$gateway" || -z "$new_etcd" ]] || nx_usage_error 'Either --gateway or --etcd, not both.'
[[ -z "$gateway" || -n "$key" ]] || nx_usage_error '--gateway needs an admin key: --key-file FILE, or NEXUS_API_KEY.'
if [[ -n "$aliases_file" && ! -r "$aliases_file" ]]; then nx_die "$NX_MISSING" "$aliases_file cannot be read."; fi
nx_temp_dir

failures=0
say() { printf '%-8s %s\n' "$1" "$2"; }
old_value() { nx_env_get "$old_env" "$1"; }

# --- Settings -------------------------------------------------------------------------------------------------------------

: >"$NX_TMP/settings"
set_new() { printf '%s\t%s\n' "$1" "$2" >>"$NX_TMP/settings"; }

# carried NAME VALUE; changed OLD NEW VALUE [WHY]
carried() {
  set_new "$1" "$2"
  case "$1" in
    *TOKEN* | *KEY* | *PASSWORD*) say carried "$1 (not shown)" ;;
    *) say carried "$1=$2" ;;
  esac
}
changed() {
  set_new "$2" "$3"
  say changed "$1 → $2=$3${4:+: $4}"
}
left() { say left "$1: $2"; }

carry_token() {
  case "$1" in
    change-me* | changeme* | your-*) left GATEWAY_BEARER_TOKEN 'an example, known to everyone; quickstart.sh makes a random one' ;;
    *) carried GATEWAY_BEARER_TOKEN "$1" ;;
  esac
}

carry_prefix() {
  case "$1" in
    /nexus/services/ | /nexus/services) say there 'ETCD_PREFIX: services stay under /nexus/services/; the new ETCD_PREFIX is what all keys begin with, /nexus/' ;;
    */services/ | */services) changed ETCD_PREFIX ETCD_PREFIX "$(printf '%s' "$1" | sed 's|services/*$||')" 'what all keys begin with' ;;
    *) left ETCD_PREFIX "services lie under /nexus/services/ now; those under $1 are copied with --old-etcd" ;;
  esac
}

carry_level() {
  local level
  level="$(printf '%s' "$1" | LC_ALL=C tr '[:upper:]' '[:lower:]')"
  case "$level" in
    debug | info | warning | error) carried LOG_LEVEL "$level" ;;
    warn) changed LOG_LEVEL LOG_LEVEL warning ;;
    critical | fatal) changed LOG_LEVEL LOG_LEVEL error ;;
    *) left LOG_LEVEL "'$1' is none of debug, info, warning, error" ;;
  esac
}

# The longest of the old time limits for media.
media_s=0 media_name=''
note_media() {
  local seconds="${2%%.*}"
  [[ -n "$seconds" && "$seconds" != *[!0-9]* ]] || return 0
  [[ "$seconds" -le "$media_s" ]] || media_s="$seconds" media_name="$1"
}

profiles=''
add_profile() {
  case ",$profiles," in *",$2,"*) ;; *) profiles="${profiles:+$profiles,}$2" ;; esac
  say changed "$1 → COMPOSE_PROFILES=$2"
}

carry_setting() {
  local name="$1" value="$2"
  case "$name" in
    GATEWAY_BEARER_TOKEN) carry_token "$value" ;;
    GATEWAY_PORT | GATEWAY_HOST | OBSERVABILITY_HOST | OBSERVABILITY_PORT) carried "$name" "$value" ;;
    MAX_REQUEST_BYTES)
      if [[ "$value" == 0 || "$value" == *[!0-9]* ]]; then
        left "$name" "there is always a limit: MAX_BODY_BYTES, 32 MiB by default"
      else
        changed "$name" MAX_BODY_BYTES "$value"
      fi
      ;;
    PUBLIC_BASE_URL) changed "$name" PUBLIC_URL "$value" ;;
    LOG_LEVEL) carry_level "$value" ;;
    ETCD_PREFIX) carry_prefix "$value" ;;
    ETCD_URL)
      case "$value" in
        http://etcd:2379 | http://etcd:2379/) say there "$name: the compose file knows its own etcd" ;;
        *) carried "$name" "$value" ;;
      esac
      ;;
    ETCD_ENABLED | ETCD_POLL_INTERVAL | ETCD_SEED_FROM_ENV | ETCD_TIMEOUT_SEC) left "$name" 'etcd is always followed, and at once' ;;
    ETCD_* | NEXUS_REGISTRATION_*) left "$name" 'docker-compose.yml configures its etcd itself; services stay entered without a registrar' ;;
    COMPOSE_PROFILES) left "$name" 'profiles are ollama, invokeai, comfyui, tts, stt now' ;;
    ENABLE_OLLAMA) [[ "$value" != true ]] || add_profile "$name" ollama ;;
    ENABLE_IMAGES) [[ "$value" != true ]] || left "$name" 'choose the profile invokeai or comfyui, or a worker below' ;;
    ENABLE_AUDIO)
      if [[ "$value" == true ]]; then add_profile "$name" tts && add_profile "$name" stt; fi
      ;;
    ENABLE_GPU) [[ "$value" != true ]] || left "$name" 'add the layer: docker compose -f docker-compose.yml -f docker-compose.gpu.yml up -d --wait' ;;
    *_TIMEOUT_SEC | SHIM_TIMEOUT_S)
      case "$name" in IMAGES_* | TTS_* | TRANSCRIPTION_* | LUXTTS_* | QWEN3_TTS_*) note_media "$name" "$value" ;; *) left "$name" "$(why_left "$name")" ;; esac
      ;;
    *_BASE_URL | AUDIO_BACKEND_URL) ;; # inference servers, below
    MODEL_ALIASES_* | EMBEDDINGS_MODEL | *_MODEL_STRONG | *_MODEL_FAST | DEFAULT_BACKEND) ;; # aliases, below
    GATEWAY_BEARER_TOKENS) left "$name" "$(printf '%s' "$value" | awk -F, '{ print NF }') keys: keys cannot be brought along, make one for each caller: nexus keys create NAME" ;;
    *) left "$name" "$(why_left "$name")" ;;
  esac
}

why_left() {
  case "$1" in
    GATEWAY_TOKEN_POLICIES*) echo 'scopes, limits and expiry belong to each key: nexus keys create --help' ;;
    GATEWAY_TLS_*) echo 'the gateway speaks HTTP: put TLS in front, docs/how-to/deployment.md' ;;
    IP_ALLOWLIST* | TRUST_PROXY_CIDRS | UI_IP_ALLOWLIST* | UI_TRUST_PROXY*) echo 'addresses are a matter of the firewall or the load balancer in front' ;;
    UI_* | USER_*) echo 'there is no web interface, and there are no accounts but API keys' ;;
    TELEGRAM_*) echo 'a bot is a client now: it needs the gateway and a key' ;;
    TOOLS_* | NEXUS_TOOL_* | NEXUS_AUTO_INJECT* | NEXUS_CLIENT_TOOL* | MEMORY_* | AGENT_* | COORDINATOR_* | NEXUS_SOUL*) echo 'tools, memory and agents are callers'"'"' business: they go through untouched' ;;
    ROUTER_*) echo 'no routing by content: models and aliases say where a request goes' ;;
    HEALTH_CHECK_* | MLX_ACTIVE_CANARY*) echo 'each worker looks after its server: WORKER_HEALTH_INTERVAL_S' ;;
    METRICS_ENABLED) echo '/metrics is always there' ;;
    BACKEND_VERIFY_TLS | BACKEND_CA_BUNDLE | BACKEND_CLIENT_CERT) echo 'workers use the system'"'"'s certificates: SSL_CERT_FILE in the worker'"'"'s environment' ;;
    *_PORT | PROXY_*) echo 'that server'"'"'s own port: start it as before, a worker goes to it' ;;
    HF_* | HUGGINGFACE*) echo 'the inference server'"'"'s own setting' ;;
    *_MEMORY_LIMIT) echo 'GATEWAY_MEMORY, WORKER_MEMORY and so on: docker-compose.yml' ;;
    *_DATA_DIR | NEXUS_RUNTIME_ROOT | MODEL_BENCHMARK_LOG_PATH) echo 'data lies under ./.runtime' ;;
    VLLM_* | MLX_* | OLLAMA_* | INVOKEAI_* | SDXL_* | IMAGES_* | LIGHTON_* | PERSONAPLEX_* | FYC_* | LTX_* | SKYREELS_* | HEARTMULA_* | POCKET_TTS_* | TTS_* | LUXTTS_* | QWEN3_TTS_* | MEDIAMTX_* | VIDEO_* | TRANSCRIPTION_* | EMBEDDINGS_* | OCR_*)
      echo 'the inference server'"'"'s own setting: start it as before'
      ;;
    *) echo 'Nexus has no such setting' ;;
  esac
}

carry_settings() {
  local name value
  nx_env_names "$old_env" >"$NX_TMP/names"
  while IFS= read -r name; do
    value="$(old_value "$name")"
    [[ -z "$value" ]] || carry_setting "$name" "$value"
  done <"$NX_TMP/names" >"$NX_TMP/report"
  # What comes along first; then what does not.
  grep -v '^left ' "$NX_TMP/report" || true
  if [[ "$media_s" -gt 600 ]]; then
    changed "$media_name" MEDIA_TIMEOUT_S "$media_s"
    [[ "$media_s" -le 900 ]] || changed "$media_name" TOTAL_TIMEOUT_S "$media_s"
  fi
  [[ -z "$profiles" ]] || set_new COMPOSE_PROFILES "$profiles"
  grep '^left ' "$NX_TMP/report" || true
}

# What was found goes into .env. One that is the old Nexus's own gives way to a fresh one.
write_env() {
  local source="$env_file" name value now wanted=false saved
  if [[ ! -f "$env_file" ]] || [[ "$env_file" -ef "$old_env" ]]; then
    source="$root/.env.example"
    wanted=true
  fi
  (umask 077 && cp "$source" "$NX_TMP/env")
  while IFS=$'\t' read -r name value; do
    now="$(nx_env_get "$NX_TMP/env" "$name")"
    if [[ "$now" != "$value" ]]; then
      if [[ "$force" == false && -n "$now" && "$source" == "$env_file" ]]; then
        left "$name" "$env_file has another value; --force replaces it"
        continue
      fi
      nx_env_set "$NX_TMP/env" "$name" "$value"
      wanted=true
    fi
  done <"$NX_TMP/settings"
  if [[ "$wanted" == false ]]; then
    say there "$env_file has all of it"
    return 0
  fi
  if [[ "$apply" == false ]]; then
    say 'would' "write $env_file"
    return 0
  fi
  if [[ -f "$env_file" ]]; then
    saved="$env_file.before-migration-$(date +%Y%m%d-%H%M%S)"
    (umask 077 && cp "$env_file" "$saved")
    say kept "$env_file as $saved"
  fi
  (umask 077 && cp "$NX_TMP/env" "$env_file.new-$$")
  mv "$env_file.new-$$" "$env_file"
  say written "$env_file"
}

# --- Aliases --------------------------------------------------------------------------------------------------------------

: >"$NX_TMP/aliases"

# bare MODEL: without what the old Nexus put before it to name the backend.
bare() {
  case "$1" in
    ollama:* | mlx:* | vllm:* | vllm_fast:* | vllm-fast:* | vllm_embeddings:* | vllm-embeddings:*) printf '%s' "${1#*:}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# add_alias NAME MODEL: the last one of a name holds, as it did.
add_alias() {
  local name
  name="$(printf '%s' "$1" | LC_ALL=C tr '[:upper:]' '[:lower:]')"
  NX_NAME="$name" awk -F '\t' '$1 != ENVIRON["NX_NAME"]' "$NX_TMP/aliases" >"$NX_TMP/aliases.new"
  mv "$NX_TMP/aliases.new" "$NX_TMP/aliases"
  printf '%s\t%s\n' "$name" "$(bare "$2")" >>"$NX_TMP/aliases"
}

# Without a file the old gateway made these by itself, of what .env named.
built_in_aliases() {
  local family strong fast
  case "$(old_value DEFAULT_BACKEND)" in
    *vllm*) family=VLLM ;;
    *mlx*) family=MLX ;;
    *) family=OLLAMA ;;
  esac
  strong="$(old_value "${family}_MODEL_STRONG")"
  fast="$(old_value "${family}_MODEL_FAST")"
  [[ -z "$strong" ]] || { add_alias default "$strong" && add_alias coder "$strong"; }
  [[ -z "$fast" ]] || add_alias fast "$fast"
}

find_aliases_file() {
  local path runtime
  [[ -z "$aliases_file" ]] || return 0
  if [[ -n "$(old_value MODEL_ALIASES_JSON)" ]]; then
    # Within quotes in .env it is JSON as it stands.
    old_value MODEL_ALIASES_JSON >"$NX_TMP/from-env.json"
    aliases_file="$NX_TMP/from-env.json"
    return 0
  fi
  runtime="$(old_value NEXUS_RUNTIME_ROOT)"
  runtime="${runtime:-./.runtime}"
  [[ "$runtime" == /* ]] || runtime="$old/$runtime"
  path="$(old_value MODEL_ALIASES_PATH)"
  for path in ${path:+"$runtime/gateway/config/${path##*/}"} ${path:+"$path"} "$runtime/gateway/config/model_aliases.json" \
    "$old/services/gateway/app/model_aliases.json" "$old/model_aliases.json"; do
    if [[ -r "$path" ]]; then
      aliases_file="$path"
      return 0
    fi
  done
}

# The old file: {"aliases": {NAME: "backend:model" or {"backend", "model", …}}}, or without the outer part.
read_aliases_file() {
  local name field token value separator=$'\037'
  [[ -n "$aliases_file" ]] || return 0
  say read "aliases from ${aliases_file/#$NX_TMP\/from-env.json/MODEL_ALIASES_JSON}"
  if ! nx_json "$separator" <"$aliases_file" >"$NX_TMP/flat"; then
    say left "aliases: $aliases_file is no JSON, so that the old gateway ignored it too"
    return 0
  fi
  # name, field, token; a name of a field is empty where the alias is a string.
  awk -F '\t' -v separator="$separator" '
    { n = split($1, part, separator); first = 1 }
    part[1] == "aliases" && n > 1 { first = 2 }
    n - first > 1 { next }
    { print part[first] "\t" (n > first ? part[first + 1] : "-") "\t" $2 }' "$NX_TMP/flat" >"$NX_TMP/fields"
  while IFS=$'\t' read -r name field token; do
    name="$(printf '"%s"\n' "$name" | nx_json_text)"
    value="$(printf '%s\n' "$token" | nx_json_text)"
    case "$field" in
      -)
        if [[ "$token" == \"*:*\" ]]; then add_alias "$name" "$value"; else left "alias $name" "'$value' names no backend and model, so that the old gateway ignored it too"; fi
        ;;
      model | upstream_model) add_alias "$name" "$value" ;;
      max_tokens_cap | max_tokens | max_output_tokens | temperature_cap | temp_cap)
        left "alias $name, $field=$value" 'requests go through as they are; callers set it, or the inference server'
        ;;
      tool_mode | soul | toolsets | auto_inject_tools) left "alias $name, $field=$value" 'tools and personas are callers'"'"' business' ;;
    esac
  done <"$NX_TMP/fields"
}

put_alias() {
  local name="$1" model="$2" there
  if [[ "$name" == "$model" ]]; then
    say there "alias $name: the model has this name itself"
    return 0
  fi
  there="$(there_is aliases "$name" | nx_json | awk -F '\t' '$1 == "" || $1 ~ /^(targets\.)?[0-9]+$/ { print $2 }' | nx_json_text | tr '\n' ',')" || there=''
  there="${there%,}"
  if [[ "$there" == "$model" ]]; then
    say there "alias $name → $model"
  elif [[ -n "$there" && "$force" == false ]]; then
    left "alias $name → $model" "it is there, for $there; --force replaces it"
  else
    put_there aliases "$name" "{\"targets\": [$(nx_json_string "$model")]}" "alias $name → $model"
  fi
}

carry_aliases() {
  local name model
  built_in_aliases
  find_aliases_file
  read_aliases_file
  model="$(old_value EMBEDDINGS_MODEL)"
  [[ -z "$model" ]] || add_alias default-embeddings "$model"
  # A request without a model goes to default-chat now.
  model="$(awk -F '\t' '$1 == "default" { print $2 }' "$NX_TMP/aliases")"
  [[ -z "$model" ]] || add_alias default-chat "$model"
  if [[ ! -s "$NX_TMP/aliases" ]]; then
    say left 'aliases: none were found'
    return 0
  fi
  while IFS=$'\t' read -r name model; do
    put_alias "$name" "$model" </dev/null
  done <"$NX_TMP/aliases"
}

# --- Services -------------------------------------------------------------------------------------------------------------

: >"$NX_TMP/services"

# What a backend of this name is for a worker: a kind, `service` where it describes itself, `none` where nothing can be done.
kind_of() {
  case "$1" in
    *ollama*) echo ollama ;;
    *vllm* | *mlx* | *llama* | *lmstudio* | *transcription* | *whisper*) echo openai ;;
    *invokeai*) echo invokeai ;;
    *comfyui*) echo comfyui ;;
    *heartmula* | *skyreels* | *ltx* | *video* | *canvas* | *fyc* | *ocr* | *personaplex* | *lifecycle* | *mediamtx* | *music*) echo none ;;
    *) echo service ;;
  esac
}

# Hosts that only containers of the old compose project could reach.
inside_old_network() {
  local host="${1#*://}"
  host="${host%%[:/]*}"
  case "$host" in
    ollama | images | tts | luxtts | qwen3-tts | invokeai | sdxl-turbo | mlx | vllm | vllm-* | lighton-ocr | personaplex | followyourcanvas | heartmula | skyreels-v2 | ltx-video | lifecycle-manager | gateway) return 0 ;;
  esac
  return 1
}

# one_backend NAME KIND BASE-URL METADATA-URL FROM
one_backend() {
  local name="$1" kind="$2" url="${3%/}" metadata="$4" from="$5"
  if [[ "$kind" == none ]]; then
    left "$from $name at $url" 'music, video and OCR have no endpoint in Nexus'
  elif inside_old_network "$url"; then
    if [[ "$kind" == ollama || "$kind" == invokeai ]]; then
      left "$from $name at $url" "only the old containers reach it: use the profile $kind, or publish its port for a worker: nexus worker --backend $kind --url http://HOST:PORT"
    elif [[ "$kind" != service ]]; then
      left "$from $name at $url" "only the old containers reach it: publish its port for a worker: nexus worker --backend $kind --url http://HOST:PORT"
    else
      left "$from $name at $url" 'only the old containers reach it: publish its port, and enter it: register-service.sh NAME http://HOST:PORT ETCD-URL'
    fi
  elif [[ "$kind" == service ]]; then
    printf '%s\t%s\t%s\n' "$name" "$url" "$metadata" >>"$NX_TMP/services"
  else
    say worker "$from $name: nexus worker --backend $kind --url $url --name $name"
    if ! grep -q '^WORKER_BACKEND	' "$NX_TMP/settings"; then
      # The worker of docker-compose.yml takes the first of them.
      changed "$name" WORKER_BACKEND "$kind"
      changed "$name" WORKER_BACKEND_URL "${url/\/\/127.0.0.1/\/\/host.docker.internal}" 'the worker in docker-compose.yml'
    fi
  fi
}

seen=' '
backends_of_env() {
  local name url advertised service kind
  while IFS= read -r name; do
    case "$name" in
      *_ADVERTISE_BASE_URL | *_UPSTREAM_BASE_URL | *SHIM_INVOKEAI* | TELEGRAM_* | PUBLIC_BASE_URL | OCR_LLM_*) continue ;;
      *_BASE_URL) ;;
      *) continue ;;
    esac
    url="$(old_value "$name")"
    advertised="$(old_value "${name%_BASE_URL}_ADVERTISE_BASE_URL")"
    url="${advertised:-$url}"
    [[ -n "$url" ]] || continue
    service="$(printf '%s' "${name%_BASE_URL}" | LC_ALL=C tr '[:upper:]_' '[:lower:]-' | sed 's/-http$//; s/-api$//')"
    kind="$(kind_of "$service")"
    if [[ "$service" == images ]]; then
      [[ "$(old_value IMAGES_BACKEND)" != http_a1111 ]] || kind=sdwebui
      [[ "$(old_value IMAGES_BACKEND)" != mock ]] || continue
    fi
    case "$seen" in *" ${url%/} "*) continue ;; esac
    seen="$seen${url%/} "
    one_backend "$service" "$kind" "$url" '' .env
  done <"$NX_TMP/names"
}

backends_of_etcd() {
  local prefix key lease record name url metadata class wanted
  [[ -n "$old_etcd" ]] || return 0
  prefix="$(old_value ETCD_PREFIX)"
  prefix="${prefix:-/nexus/services/}"
  [[ "$prefix" == */ ]] || prefix="$prefix/"
  # In a shell of its own: the new etcd has its own connection.
  (
    [[ -z "$new_etcd" ]] || NX_ETCD_USER='' NX_ETCD_CA='' NX_ETCD_CERT='' NX_ETCD_KEY=''
    nx_etcd_open "$old_etcd"
    nx_etcd_list "$prefix"
  ) >"$NX_TMP/records" || exit "$NX_FAILED"
  say read "$(awk 'END { print NR }' "$NX_TMP/records") services from $old_etcd, under $prefix"
  while IFS=$'\t' read -r key lease record; do
    name="${key#"$prefix"}"
    url="$(printf '%s' "$record" | nx_json_get base_url)" || url=''
    if [[ -z "$url" ]]; then
      left "service $name" 'its record names no base_url'
      continue
    fi
    metadata="$(printf '%s' "$record" | nx_json_get metadata_url)" || metadata=''
    class="$(printf '%s' "$record" | nx_json_get backend_class)" || class=''
    seen="$seen${url%/} "
    wanted="$(kind_of "$(printf '%s' "$name ${class//_/-}" | LC_ALL=C tr '[:upper:]' '[:lower:]')")"
    one_backend "$name" "$wanted" "$url" "$metadata" etcd
    [[ "$lease" == 0 || "$wanted" != service ]] || say note "$name was kept alive by its registrar; here it stays until it is removed: stop that registrar"
  done <"$NX_TMP/records"
}

put_service() {
  local name="$1" url="$2" metadata="$3" there
  there="$(there_is services "$name" | nx_json_get base_url)" || there=''
  if [[ "${there%/}" == "$url" ]]; then
    say there "service $name at $url"
  elif [[ -n "$there" && "$force" == false ]]; then
    left "service $name at $url" "it is there, at $there; --force replaces it"
  elif [[ -n "$gateway" ]]; then
    put_there services "$name" "{\"base_url\": $(nx_json_string "$url")${metadata:+, \"metadata_url\": $(nx_json_string "$metadata")}}" "service $name at $url"
  else
    put_there services "$name" "{\"name\": $(nx_json_string "$name"), \"base_url\": $(nx_json_string "$url"), \"metadata_url\": $(nx_json_string "${metadata:-$url/v1/metadata}")}" "service $name at $url"
  fi
}

# --- Where aliases and services go: the gateway's API, or etcd ----------------------------------------------------------------

# escaped TEXT: as one part of a URL's path.
escaped() {
  printf '%s' "$1" | LC_ALL=C od -An -v -tx1 | tr -d ' \n' | sed 's/../%&/g'
}

call_gateway() {
  local answer status message
  answer="$(printf '%s' "${3:-}" | curl --silent --show-error --max-time 20 --request "$1" --write-out '\n%{http_code}' \
    --config <(nx_curl_header Authorization "Bearer $key") --header 'Content-Type: application/json' ${3:+--data-binary @-} "$gateway$2" 2>&1)" || {
    printf '%s' "$answer"
    return 1
  }
  status="${answer##*$'\n'}" answer="${answer%$'\n'*}"
  if [[ "$status" != 2?? ]]; then
    message="$(printf '%s' "$answer" | nx_json_get error.message)"
    printf '%s' "$status: ${message:-$answer}"
    return 1
  fi
  printf '%s\n' "$answer"
}

# there_is aliases|services NAME: its value; nothing where there is none, or nowhere to look.
there_is() {
  if [[ -n "$new_etcd" ]]; then
    nx_etcd_get "$NX_ETCD_PREFIX$1/$2" || true
  elif [[ -n "$gateway" ]]; then
    nx_json <"$NX_TMP/$1.there" | NX_ID="$(nx_json_string "$2")" awk -F '\t' -v kind="$1" '
      { split($1, part, "."); here = part[2] }
      part[3] == "id" && $2 == ENVIRON["NX_ID"] { mine = here }
      kind == "aliases" && part[3] == "targets" { said[here] = said[here] (said[here] == "" ? "" : ",") $2 }
      kind == "services" && part[3] == "base_url" { said[here] = "{\"base_url\": " $2 "}" }
      END { if (mine != "") print (kind == "aliases" ? "[" said[mine] "]" : said[mine]) }'
  fi
}

# put_there aliases|services NAME JSON WHAT
put_there() {
  local said
  if [[ -z "$gateway$new_etcd" ]]; then
    say would "$4: once the new Nexus runs, repeat with --gateway URL"
  elif [[ "$apply" == false ]]; then
    say would "$4"
  elif [[ -n "$gateway" ]]; then
    if said="$(call_gateway PUT "/v1/$1/$(escaped "$2")" "$3")"; then
      say carried "$4"
    else
      say failed "$4: $said"
      failures=$((failures + 1))
    fi
  elif nx_etcd_put "$NX_ETCD_PREFIX$1/$2" "$3"; then
    say carried "$4"
  else
    say failed "$4"
    failures=$((failures + 1))
  fi
}

open_target() {
  local one
  if [[ -n "$new_etcd" ]]; then
    nx_etcd_open "$new_etcd"
  elif [[ -n "$gateway" ]]; then
    nx_need curl 'Install curl.'
    for one in aliases services; do
      call_gateway GET "/v1/$one" >"$NX_TMP/$one.there" \
        || nx_die "$NX_FAILED" "The gateway does not list its $one: $(cat "$NX_TMP/$one.there")" 'Is the URL right, and the key one with the scope admin?'
    done
  fi
}

open_target
printf '%s\n' "--- Settings: $old_env"
carry_settings
printf '%s\n' '--- Inference servers and services'
backends_of_etcd
backends_of_env
while IFS=$'\t' read -r name url metadata; do
  put_service "$name" "$url" "$metadata" </dev/null
done <"$NX_TMP/services"
printf '%s\n' '--- Aliases'
carry_aliases
printf '%s\n' "--- $env_file"
write_env
if [[ -d "$old/.runtime/gateway/data" ]]; then
  left "$old/.runtime/gateway/data" 'accounts, chats, memory, tool logs: nothing here reads them'
fi
[[ "$apply" == true ]] || printf '\nNothing was changed. With --apply it is.\n'
[[ "$failures" -eq 0 ]] || nx_die "$NX_FAILED" "$failures could not be written." 'Above are the reasons. Mend them, and repeat: what is done stays done.'
