#!/usr/bin/env bash
# Look at a host before Nexus is started there: what is missing, and what to do about it. Changes nothing.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: preflight-check.sh [options]

Checks whether Nexus can start here: tools and their versions, the Docker daemon, free ports, disk against what NATS
reserves, memory, .env, and write permission. It changes nothing.

  --compose     for docker compose (default)
  --embedded    for `make up`: Python and make in the place of Docker
  --worker      for docker-compose.worker.yml: workers only, no port, no disk for NATS
  --gpu         also what docker-compose.gpu.yml needs: driver, NVIDIA Container Toolkit
  --prod        also what docker-compose.prod.yml needs: secrets, certificates that have not expired
  --env FILE    the settings (default: .env at the repository's root)
  --json        one JSON object on standard output
  --help        this text

Exit: 0 ready, perhaps with warnings · 1 something must be mended first · 2 wrong use
HELP
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mode=compose gpu=false prod=false as_json=false env_file="$root/.env"
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --compose | --embedded | --worker) mode="${1#--}" ;;
    --gpu) gpu=true ;;
    --prod) prod=true ;;
    --json) as_json=true ;;
    --env) nx_option_value "$1" $# && env_file="$2" && shift ;;
    *) nx_usage_error "Unknown option $1." ;;
  esac
  shift
done

bad=0 warned=0 rows=''

# row ok|warn|fail NAME DETAIL [WHAT TO DO]
row() {
  local color="$NX_GREEN"
  case "$1" in
    warn) warned=$((warned + 1)) color="$NX_YELLOW" ;;
    fail) bad=$((bad + 1)) color="$NX_RED" ;;
  esac
  if [[ "$as_json" == true ]]; then
    rows="$rows${rows:+, }{\"name\": $(nx_json_string "$2"), \"status\": \"$1\", \"detail\": $(nx_json_string "$3"), \"hint\": $(nx_json_string "${4:-}")}"
    return 0
  fi
  [[ -t 1 ]] || color=''
  printf '%s%-5s%s %-12s %s\n' "$color" "$1" "${color:+$NX_PLAIN}" "$2" "$3"
  [[ "$1" == ok || -z "${4:-}" ]] || printf '%-18s %s\n' '' "$4"
}

# setting NAME DEFAULT: from the environment, else .env, as compose reads it.
setting() {
  local value="${!1:-}"
  value="${value:-$(nx_env_get "$env_file" "$1")}"
  printf '%s' "${value:-$2}"
}

# at_least VERSION WANTED: both as MAJOR.MINOR…
at_least() {
  local have="${1%%[!0-9.]*}" major minor
  major="${have%%.*}" minor="${have#*.}"
  minor="${minor%%.*}"
  [[ "${major:-0}" -gt "${2%%.*}" ]] || [[ "${major:-0}" -eq "${2%%.*}" && "${minor:-0}" -ge "${2#*.}" ]]
}

check_tools() {
  local tool version
  if at_least "${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]}" 3.2; then
    row ok bash "${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]}"
  else
    row fail bash "$BASH_VERSION is too old" 'Install bash 3.2 or newer.'
  fi
  for tool in curl openssl; do
    if nx_has "$tool"; then
      version="$("$tool" "$([[ "$tool" == curl ]] && echo --version || echo version)" 2>/dev/null | awk 'NR == 1 { print $2 }')"
      row ok "$tool" "$version"
    else
      row fail "$tool" 'not installed' "deploy/scripts/install-host-deps.sh installs it."
    fi
  done
}

check_docker() {
  local version said
  if ! nx_has docker; then
    row fail docker 'not installed' 'deploy/scripts/install-host-deps.sh installs it; ./quickstart.sh --embedded needs none.'
    return 0
  fi
  # A hanging daemon is one that does not answer.
  if ! said="$(docker version --format '{{.Server.Version}}' 2>&1)"; then
    case "$said" in
      *[Pp]ermission*) row fail docker 'the daemon refuses this user' "sudo usermod -aG docker $(id -un), then log in again; members of that group are root on this host." ;;
      *) row fail docker "the daemon does not answer: $(printf '%s' "$said" | tail -n 1 | cut -c1-120)" 'Start it: sudo systemctl start docker (Linux), Docker Desktop or colima start (macOS).' ;;
    esac
    return 0
  fi
  version="$(printf '%s' "$said" | tail -n 1)"
  if at_least "$version" 25.0; then row ok docker "$version"; else row fail docker "$version is too old" 'Docker Engine 25 or newer is needed: deploy/scripts/install-host-deps.sh'; fi
  if ! version="$(docker compose version --short 2>/dev/null)"; then
    row fail compose 'the compose plugin is not installed' 'deploy/scripts/install-host-deps.sh installs it (package docker-compose-plugin).'
  elif at_least "${version#v}" 2.24; then
    row ok compose "$version"
  else
    row fail compose "$version is too old" 'Docker Compose 2.24 or newer is needed.'
  fi
}

check_python() {
  local python found=''
  for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if nx_has "$python" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      found="$python"
      break
    fi
  done
  if [[ -z "$found" ]]; then
    row fail python 'none that is 3.11 or newer' 'Debian, Ubuntu: sudo apt install python3 python3-venv · macOS: brew install python@3.13'
  elif ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
    row fail python "$found has no venv module" "Debian, Ubuntu: sudo apt install $("$found" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-venv"
  else
    row ok python "$("$found" --version 2>&1)"
  fi
  if nx_has make; then row ok make "$(make --version 2>/dev/null | head -n 1)"; else row fail make 'not installed' 'Debian, Ubuntu: sudo apt install make · macOS: xcode-select --install'; fi
}

# Whether anybody listens there.
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

check_port() {
  local name="$1" port
  port="$(setting "$1" "$2")"
  if [[ "$port" == *[!0-9]* || "$port" -lt 1 || "$port" -gt 65535 ]]; then
    row fail "port" "$name=$port is no port" "Set $name to a number from 1 to 65535."
  elif ! listening "$port"; then
    row ok "port $port" "free ($name)"
  elif [[ "$mode" == compose ]] && nx_has docker && [[ -n "$(docker ps --quiet --filter "publish=$port" --filter "label=com.docker.compose.project.working_dir=$root" 2>/dev/null)" ]]; then
    row ok "port $port" 'this Nexus has it'
  else
    row fail "port $port" 'somebody else listens there' "See who: lsof -i :$port (or ss -ltnp). Or set $name in .env to another port."
  fi
}

gib() { awk -v bytes="$1" 'BEGIN { printf "%.1f GiB", bytes / 1073741824 }'; }

# bytes TEXT: of 24GB, 512m, 1Ti, 4096.
bytes() {
  printf '%s' "$1" | awk '{
    number = $0 + 0; unit = tolower($0); gsub(/[0-9.]/, "", unit); sub(/i?b$/, "", unit)
    factor["k"] = 1024; factor["m"] = 1048576; factor["g"] = 1073741824; factor["t"] = 1099511627776
    printf "%.0f", number * (unit in factor ? factor[unit] : 1) }'
}

check_disk() {
  local data="$root/.runtime" free used=0 reserved store name default
  [[ "$mode" == compose ]] || data="$root/.nexus"
  reserved=1073741824 # dead letters
  for name in MAX_QUEUE_BYTES:4294967296 MAX_EVENT_BYTES:2147483648 MAX_RESULT_BYTES:2147483648 MAX_BLOB_BYTES:4294967296; do
    default="${name#*:}" name="${name%%:*}"
    default="$(setting "$name" "$default")"
    if [[ "$default" == *[!0-9]* ]]; then
      row fail disk "$name=$default is no number of bytes" "Write it as digits alone."
      return 0
    fi
    reserved=$((reserved + default))
  done
  free="$(df -Pk "$([[ -d "$data" ]] && echo "$data" || echo "$root")" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')"
  [[ ! -r "$data/nats" ]] || used="$(du -sk "$data/nats" 2>/dev/null | awk '{ printf "%.0f", $1 * 1024 }')" || used=0
  store="$(bytes "$(setting NATS_MAX_STORE 24GB)")"
  if [[ "$mode" == compose && "$reserved" -gt "$store" ]]; then
    row fail disk "the streams reserve $(gib "$reserved"), more than NATS_MAX_STORE ($(gib "$store"))" 'Lower the MAX_*_BYTES in .env, or raise NATS_MAX_STORE.'
  elif [[ "$free" -lt 2147483648 ]]; then
    row fail disk "$(gib "$free") free" "At least 2 GiB are needed to start, $(gib "$reserved") for all that the streams may hold."
  elif [[ $((free + used)) -lt "$reserved" ]]; then
    row warn disk "$(gib "$free") free, but the streams may grow to $(gib "$reserved")" 'Lower MAX_QUEUE_BYTES, MAX_EVENT_BYTES, MAX_RESULT_BYTES, MAX_BLOB_BYTES in .env, or make room.'
  else
    row ok disk "$(gib "$free") free; the streams may grow to $(gib "$reserved")"
  fi
}

check_memory() {
  local total=0 wanted=2147483648
  [[ "$mode" != embedded ]] || wanted=4294967296
  [[ "$mode" != worker ]] || wanted=536870912
  if [[ -r /proc/meminfo ]]; then
    total="$(awk '/^MemTotal:/ { printf "%.0f", $2 * 1024 }' /proc/meminfo)"
  elif nx_has sysctl; then
    total="$(sysctl -n hw.memsize 2>/dev/null || echo 0)"
  fi
  if [[ "$total" -eq 0 ]]; then
    row warn memory 'not known' "Nexus wants $(gib "$wanted")."
  elif [[ "$total" -lt "$wanted" ]]; then
    row warn memory "$(gib "$total"), less than $(gib "$wanted")" 'It starts, but may be killed under load.'
  else
    row ok memory "$(gib "$total")"
  fi
}

# Names that .env may hold: what .env.example documents, what the compose files read, and compose's own.
known_names() {
  nx_env_known "$root/.env.example"
  cat "$root"/docker-compose*.yml 2>/dev/null | grep -oE '\$\{[A-Z][A-Z0-9_]*|^ +[A-Z][A-Z0-9_]*: *$' | tr -cd 'A-Z0-9_\n' || true
  printf '%s\n' HTTP_PROXY HTTPS_PROXY NO_PROXY TZ HF_TOKEN NEXUS_URL NEXUS_API_KEY
}

check_env() {
  local names unknown old key repeated
  if [[ ! -f "$env_file" ]]; then
    row warn .env 'not there: defaults hold' 'cp .env.example .env (./quickstart.sh does it).'
    return 0
  fi
  names="$(nx_env_names "$env_file")"
  unknown="$(printf '%s\n' "$names" | grep . | grep -vE '^(COMPOSE|DOCKER|BUILDKIT)_' | grep -vxF "$(known_names)" | tr '\n' ' ' || true)"
  old="$(printf '%s\n' "$names" | grep -cxE 'ETCD_ENABLED|ETCD_SEED_FROM_ENV|DEFAULT_BACKEND|ENABLE_GPU|IMAGES_BACKEND|ROUTER_ENABLE_POLICY|MEMORY_V2_ENABLED|OLLAMA_BASE_URL|VLLM_BASE_URL' || true)"
  repeated="$(sed -nE 's/^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)=.*$/\1/p' "$env_file" | sort | uniq -d | tr '\n' ' ')"
  if [[ "$old" -ge 2 ]]; then
    row warn .env 'looks like that of the HTTP-proxying Nexus' 'deploy/scripts/migrate-from-nexus-http.sh carries it over.'
  elif [[ -n "$unknown" ]]; then
    row warn .env "names that nothing reads: $unknown" 'Misspelt? .env.example has all that there are.'
  else
    row ok .env "$(printf '%s' "$names" | grep -c . || true) settings"
  fi
  [[ -z "$repeated" ]] || row warn .env "set more than once, the last one holds: $repeated"
  case "$(nx_env_get "$env_file" ETCD_PREFIX)" in
    */services | */services/) row fail .env 'ETCD_PREFIX ends in services/, as the HTTP-proxying Nexus had it' 'It is what all keys begin with: ETCD_PREFIX=/nexus/' ;;
  esac
  key="$(nx_env_get "$env_file" GATEWAY_BEARER_TOKEN)"
  case "$key" in
    '') ;;
    change-me* | changeme* | your-* | choose-* | secret | password | test | token)
      row fail key 'GATEWAY_BEARER_TOKEN is an example, known to everyone' "Take a random one: openssl rand -hex 24"
      ;;
    *)
      if [[ ${#key} -lt 20 ]]; then
        row warn key "GATEWAY_BEARER_TOKEN has only ${#key} characters" 'Anyone who guesses it may do everything. Take a random one: openssl rand -hex 24'
      elif [[ -n "$(find "$env_file" -prune -perm -004 2>/dev/null)" ]]; then
        row warn key "every user of this host can read it in $env_file" "chmod 600 $env_file"
      else
        row ok key 'set in .env'
      fi
      ;;
  esac
}

check_writing() {
  local data="$root/.runtime"
  [[ "$mode" != embedded ]] || data="$root/.nexus"
  if [[ -e "$data" && ! -d "$data" ]]; then
    row fail data "$data is no folder" 'Move it away.'
  elif [[ -d "$data" && -w "$data" ]] || [[ ! -e "$data" && -w "$root" ]]; then
    row ok data "$data can be written"
  elif [[ "$mode" == compose && -d "$data" ]]; then
    row ok data "$data is the containers'"
  else
    row fail data "$data cannot be written by $(id -un)" "sudo chown $(id -un) $([[ -e "$data" ]] && echo "$data" || echo "$root")"
  fi
}

check_gpu() {
  local said
  if ! nx_has nvidia-smi; then
    row fail gpu 'no NVIDIA driver (nvidia-smi is not there)' 'Install the driver that NVIDIA or your distribution has for this card.'
    return 0
  fi
  if ! said="$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>&1)"; then
    row fail gpu "nvidia-smi: $(printf '%s' "$said" | head -n 1)" 'Does the driver fit the kernel? A restart after an update helps often.'
    return 0
  fi
  row ok gpu "$(printf '%s' "$said" | tr '\n' ';')"
  if docker info --format '{{json .Runtimes}} {{json .CDISpecDirs}}' 2>/dev/null | grep -q '"nvidia"'; then
    row ok toolkit 'Docker has the runtime nvidia'
  elif nx_has nvidia-ctk; then
    row fail toolkit 'the NVIDIA Container Toolkit is installed, but Docker does not know it' 'sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker'
  else
    row fail toolkit 'the NVIDIA Container Toolkit is not installed' 'deploy/scripts/install-host-deps.sh --nvidia installs it.'
  fi
}

# etcd's roles hold from 3.5.33 and 3.6.14 on (backbone/registry/version_check.py); the image is docker-compose.yml's, or another file's here.
check_etcd_image() {
  local image
  image="$(sed -nE 's/^[[:space:]]*image:[[:space:]]*([^[:space:]#]*etcd:v[^[:space:]@#]*).*/\1/p' "$root/docker-compose.yml" | head -n 1)"
  case "$(printf '%s' "${image##*:v}" | awk -F. '{ sound = $1 > 3 || $2 > 6 || ($2 == 6 && $3 + 0 >= 14) || ($2 == 5 && $3 + 0 >= 33); print sound ? "sound" : "old" }')" in
    sound) row ok etcd "$image" ;;
    *) row fail etcd "${image:-no image of etcd in docker-compose.yml}: users of etcd get past their roles" 'Take quay.io/coreos/etcd:v3.5.33, v3.6.14 or newer.' ;;
  esac
}

# check_client_certificates: a folder that was made before etcd asked for certificates lacks them.
check_client_certificates() {
  local folder lacking=''
  for folder in "$root/.runtime/secrets"/{gateway,worker,admin,worker-*}; do
    [[ ! -d "$folder" || -s "$folder/etcd-client.crt" ]] || lacking="$lacking ${folder##*/}"
  done
  if [[ -n "$lacking" ]]; then
    row fail certificates "etcd asks for a certificate, which these lack:$lacking" 'deploy/scripts/make-secrets.sh makes them; copy the folders of workers to their hosts again.'
  fi
}

check_prod() {
  check_etcd_image
  if [[ -z "$(setting NEXUS_BIND_ADDRESS '')" ]]; then
    row fail address 'NEXUS_BIND_ADDRESS is not set' "In .env: this host's address in the network that it shares with the workers' hosts, or 127.0.0.1."
  fi
  local folder certificate soon='' gone=''
  folder=secrets
  if [[ ! -d "$root/.runtime/$folder" ]]; then
    row fail "$folder" ".runtime/$folder is not there" 'deploy/scripts/make-secrets.sh makes it.'
    return 0
  fi
  check_client_certificates
  while IFS= read -r certificate; do
    if ! openssl x509 -in "$certificate" -noout -checkend 0 >/dev/null 2>&1; then
      gone="$gone ${certificate##*/}"
    elif ! openssl x509 -in "$certificate" -noout -checkend 2592000 >/dev/null 2>&1; then
      soon="$soon ${certificate##*/}"
    fi
  done < <(find "$root/.runtime/$folder" -type f \( -name '*.crt' -o -name '*cert*.pem' -o -name 'ca.pem' \) 2>/dev/null)
  if [[ -n "$gone" ]]; then
    row fail tls "expired, or no certificate:$gone" 'deploy/scripts/make-secrets.sh makes new ones.'
  elif [[ -n "$soon" ]]; then
    row warn tls "expires within 30 days:$soon" 'deploy/scripts/make-secrets.sh makes new ones.'
  else
    row ok tls 'certificates are good for 30 days and more'
  fi
}

check_tools
if [[ "$mode" == embedded ]]; then check_python; else check_docker; fi
if [[ "$mode" != worker ]]; then
  check_port GATEWAY_PORT 8800
  [[ "$mode" != embedded ]] || check_port OBSERVABILITY_PORT 8801
  check_disk
fi
check_memory
check_env
check_writing
[[ "$gpu" == false ]] || check_gpu
[[ "$prod" == false ]] || check_prod

if [[ "$as_json" == true ]]; then
  printf '{"ok": %s, "mode": "%s", "failed": %d, "warnings": %d, "checks": [%s]}\n' \
    "$([[ "$bad" -eq 0 ]] && echo true || echo false)" "$mode" "$bad" "$warned" "$rows"
elif [[ "$bad" -gt 0 ]]; then
  printf '%d to mend, %d warnings\n' "$bad" "$warned"
else
  printf 'ready, %d warnings\n' "$warned"
fi
[[ "$bad" -eq 0 ]] || exit "$NX_FAILED"
