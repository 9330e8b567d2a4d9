# shellcheck shell=bash
# What the scripts share. Sourced, never run; bash 3.2 (macOS) and later, curl, openssl, and POSIX tools.
#
# Exit codes, the same in every script: 0 done, 1 it did not work, 2 wrong use of the script, 3 something is missing here.

NX_FAILED=1
NX_USAGE=2
NX_MISSING=3

if [[ -t 2 && -z "${NO_COLOR:-}" ]]; then
  NX_RED=$'\033[31m' NX_GREEN=$'\033[32m' NX_YELLOW=$'\033[33m' NX_BOLD=$'\033[1m' NX_PLAIN=$'\033[0m'
else
  NX_RED='' NX_GREEN='' NX_YELLOW='' NX_BOLD='' NX_PLAIN=''
fi

nx_step() { printf '%s==> %s%s\n' "$NX_BOLD" "$*" "$NX_PLAIN" >&2; }
nx_say() { printf '%s\n' "$*" >&2; }
nx_ok() { printf '%sok%s    %s\n' "$NX_GREEN" "$NX_PLAIN" "$*" >&2; }
nx_warn() { printf '%swarn%s  %s\n' "$NX_YELLOW" "$NX_PLAIN" "$*" >&2; }
nx_error() { printf '%serror%s %s\n' "$NX_RED" "$NX_PLAIN" "$*" >&2; }

# nx_die CODE MESSAGE [WHAT TO DO]
nx_die() {
  nx_error "$2"
  [[ -z "${3:-}" ]] || nx_say "      $3"
  exit "$1"
}

# nx_usage_error MESSAGE: wrong use.
nx_usage_error() { nx_die "$NX_USAGE" "$1" "See: ${0##*/} --help"; }

nx_has() { command -v "$1" >/dev/null 2>&1; }

# nx_need COMMAND WHAT-TO-DO
nx_need() { nx_has "$1" || nx_die "$NX_MISSING" "$1 is not installed." "$2"; }

# nx_option_value OPTION COUNT: there must be a word after the option.
nx_option_value() { [[ "$2" -ge 2 ]] || nx_usage_error "$1 needs a value."; }

# nx_confirm QUESTION: yes or no from the terminal; with NX_YES=true always yes, without a terminal no.
nx_confirm() {
  local answer=''
  [[ "${NX_YES:-false}" != true ]] || return 0
  if [[ ! -t 0 ]]; then
    nx_warn "$1 Not answered: there is no terminal. Use --yes to agree beforehand."
    return 1
  fi
  read -r -p "$1 [y/N] " answer || true
  [[ "$answer" == [yY] || "$answer" == [yY][eE][sS] ]]
}

# nx_temp_dir: a folder that is removed when the script ends, in NX_TMP.
nx_temp_dir() {
  NX_TMP="$(mktemp -d "${TMPDIR:-/tmp}/nexus.XXXXXX")"
  trap 'rm -rf "$NX_TMP"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# nx_random_key: as `nexus up` makes them.
nx_random_key() { printf 'nexus-%s\n' "$(openssl rand -base64 24 | tr '+/' '-_' | tr -d '=\n')"; }

# --- .env ---------------------------------------------------------------------------------------------------------------

# nx_env_get FILE NAME: the value that NAME has there, as docker compose and pydantic read it; empty where it has none.
nx_env_get() {
  [[ -f "$1" ]] || return 0
  NX_NAME="$2" awk '
    BEGIN { name = ENVIRON["NX_NAME"] }
    { line = $0; sub(/\r$/, "", line); sub(/^[ \t]*(export[ \t]+)?/, "", line) }
    index(line, name) == 1 && substr(line, length(name) + 1) ~ /^[ \t]*=/ {
      value = substr(line, length(name) + 1); sub(/^[ \t]*=[ \t]*/, "", value)
      first = substr(value, 1, 1)
      if (first == "\"" || first == "\047") {
        value = substr(value, 2); end = index(value, first); if (end) value = substr(value, 1, end - 1)
      } else { sub(/[ \t]+#.*$/, "", value); sub(/[ \t]+$/, "", value) }
      found = value
    }
    END { if (found != "") print found }' "$1"
}

# nx_env_names FILE: the names that are set there, each once.
nx_env_names() {
  sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=.*$/\2/p' "$1" | sort -u
}

# nx_env_known FILE: the names that an .env.example documents, set or commented out.
nx_env_known() { sed -nE 's/^#?[[:space:]]*([A-Z][A-Z0-9_]*)=.*$/\1/p' "$1" | sort -u; }

# nx_env_set FILE NAME VALUE: the one line, in place, with the file's mode kept; at the end where there was none.
nx_env_set() {
  local temporary="$1.nexus-$$"
  cp -p "$1" "$temporary"
  NX_NAME="$2" NX_VALUE="$3" awk '
    BEGIN { name = ENVIRON["NX_NAME"]; line = name "=" ENVIRON["NX_VALUE"] }
    !done && (index($0, name "=") == 1 || index($0, "#" name "=") == 1) { print line; done = 1; next }
    index($0, name "=") == 1 { next }
    { print }
    END { if (!done) print line }' "$1" >"$temporary"
  mv "$temporary" "$1"
}

# --- JSON, without jq or python -----------------------------------------------------------------------------------------

# nx_json [SEPARATOR]: each value of the JSON on stdin as a line PATH<TAB>TOKEN: strings stay quoted, an empty object is
# {}, an empty list []. Keys and numbers of elements make the path. Status 1 where it is no JSON.
nx_json() {
  LC_ALL=C grep -oE '"([^"\\]|\\.)*"|[][{}:,]|[^][{}:,"[:space:]]+' | LC_ALL=C awk -v separator="${1:-.}" '
    function bad() { failed = 1; exit 1 }
    function path(  i, text) {
      for (i = 1; i <= depth; i++) text = text (i > 1 ? separator : "") (kind[i] == "{" ? key[i] : number[i])
      return text
    }
    function begins() {
      if (depth == 0) { if (ended) bad() }
      else if (state[depth] != "value" && state[depth] != "first") bad()
      else if (kind[depth] == "{" && state[depth] == "first") bad()
      if (depth && kind[depth] == "[") number[depth]++
    }
    function ends() { if (depth == 0) ended = 1; else state[depth] = "next" }
    function opened(bracket) { begins(); depth++; kind[depth] = bracket; state[depth] = "first"; number[depth] = -1 }
    function closed(bracket,  empty) {
      if (!depth || kind[depth] != bracket || (state[depth] != "first" && state[depth] != "next")) bad()
      empty = state[depth] == "first"; depth--
      if (empty) print path() "\t" (bracket == "{" ? "{}" : "[]")
      ends()
    }
    $0 == "{" || $0 == "[" { opened($0); next }
    $0 == "}" { closed("{"); next }
    $0 == "]" { closed("["); next }
    $0 == "," { if (!depth || state[depth] != "next") bad(); state[depth] = kind[depth] == "{" ? "key" : "value"; next }
    $0 == ":" { if (!depth || state[depth] != "colon") bad(); state[depth] = "value"; next }
    depth && kind[depth] == "{" && (state[depth] == "first" || state[depth] == "key") {
      if (substr($0, 1, 1) != "\"") bad()
      key[depth] = substr($0, 2, length($0) - 2); state[depth] = "colon"; next
    }
    !/^"/ && !/^(true|false|null|-?[0-9][-+.eE0-9]*)$/ { bad() }
    { begins(); print path() "\t" $0; ends() }
    END { if (failed || depth || !ended) exit 1 }'
}

# nx_json_text: JSON strings, one a line, as the text that they stand for; what is no string stays as it is.
nx_json_text() {
  LC_ALL=C awk '
    function hex(text,  i, sum) {
      for (i = 1; i <= 4; i++) sum = sum * 16 + index("0123456789abcdef", tolower(substr(text, i, 1))) - 1
      return sum
    }
    function utf8(code) {
      if (code < 128) return sprintf("%c", code)
      if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
      if (code < 65536) return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
      return sprintf("%c%c%c%c", 240 + int(code / 262144), 128 + int(code / 4096) % 64, 128 + int(code / 64) % 64, 128 + code % 64)
    }
    !/^"/ { print; next }
    {
      rest = substr($0, 2, length($0) - 2); text = ""
      while ((at = index(rest, "\\")) > 0) {
        text = text substr(rest, 1, at - 1); letter = substr(rest, at + 1, 1); rest = substr(rest, at + 2)
        if (letter == "u") {
          code = hex(rest); rest = substr(rest, 5)
          if (code >= 55296 && code < 56320 && substr(rest, 1, 2) == "\\u") {
            code = 65536 + (code - 55296) * 1024 + hex(substr(rest, 3)) - 56320; rest = substr(rest, 7)
          }
          text = text utf8(code)
        } else if (letter == "n") text = text "\n"
        else if (letter == "t") text = text "\t"
        else if (letter == "r") text = text "\r"
        else if (letter == "b") text = text "\b"
        else if (letter == "f") text = text "\f"
        else text = text letter
      }
      print text rest
    }'
}

# nx_json_get PATH: one value of the JSON on stdin, as text; empty where there is none, or no JSON.
nx_json_get() {
  { nx_json || true; } | NX_PATH="$1" LC_ALL=C awk -F '\t' '$1 == ENVIRON["NX_PATH"] { print $2 }' | nx_json_text
}

# nx_json_string TEXT: the text as a JSON string.
nx_json_string() {
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  text="${text//$'\t'/\\t}"
  text="${text//$'\r'/\\r}"
  printf '"%s"' "$(printf '%s' "$text" | LC_ALL=C tr -d '\000-\037')"
}

nx_base64() { base64 | tr -d '\n'; }
nx_unbase64() { base64 --decode; }

# --- HTTP ---------------------------------------------------------------------------------------------------------------

# nx_curl_header NAME VALUE: a line for `curl --config <(…)`, so that no secret stands in the list of processes.
nx_curl_header() {
  local value="${2//\\/\\\\}"
  printf 'header = "%s: %s"\n' "$1" "${value//\"/\\\"}"
}

# nx_wait_http URL SECONDS [CURL ARGUMENT…]: until it answers 200.
nx_wait_http() {
  local url="$1" until=$((SECONDS + $2))
  shift 2
  while ! curl --silent --fail --max-time 5 --output /dev/null ${@+"$@"} "$url" 2>/dev/null; do
    [[ "$SECONDS" -lt "$until" ]] || return 1
    sleep 1
  done
}

# --- docker compose -----------------------------------------------------------------------------------------------------

# nx_prod_identity [OPTION OF docker compose…]: in NX_IDENTITY, how `docker compose run` becomes production's users who may
# read and write all data, which a gateway's own may not. Empty where production's overlay is not among the files.
nx_prod_identity() {
  NX_IDENTITY=()
  docker compose ${@+"$@"} config --services 2>/dev/null | grep -x etcd-users >/dev/null || return 0
  # shellcheck disable=SC2034  # for anyone who calls this
  NX_IDENTITY=(
    -e NATS_USER=admin -e NATS_PASSWORD_FILE=/etc/nexus/admin/nats-password
    -e ETCD_USER=root -e ETCD_PASSWORD_FILE=/etc/nexus/admin/etcd-password
    -e REDIS_URL=rediss://admin@redis:6379/0 -e REDIS_PASSWORD_FILE=/etc/nexus/admin/redis-password
    -v "$PWD/.runtime/run/admin:/etc/nexus/admin:ro"
  )
}

# --- etcd ---------------------------------------------------------------------------------------------------------------

nx_etcd_help() {
  cat <<'HELP'
Connection to etcd:
  ETCD-URL              one or more http(s) URLs, separated by commas; the first that answers is used
  --prefix PREFIX       what every key of Nexus begins with (default: $ETCD_PREFIX, else /nexus/)
  --user NAME           log in; the password comes from --password-file, $ETCD_PASSWORD_FILE or $ETCD_PASSWORD
                        (default: $ETCD_USER)
  --password-file FILE  holds the password
  --cacert FILE         authority of the certificate of an https URL (default: $ETCD_TLS_CA, else the system's)
  --cert FILE, --key FILE   a certificate of our own, where etcd wants one (default: $ETCD_TLS_CERT, $ETCD_TLS_KEY)

HELP
}

NX_ETCD_PREFIX="${ETCD_PREFIX:-/nexus/}"
NX_ETCD_USER="${ETCD_USER:-}"
NX_ETCD_PASSWORD_FILE="${ETCD_PASSWORD_FILE:-}"
NX_ETCD_CA="${ETCD_TLS_CA:-}"
NX_ETCD_CERT="${ETCD_TLS_CERT:-}"
NX_ETCD_KEY="${ETCD_TLS_KEY:-}"
NX_ETCD_URL=''
NX_ETCD_TOKEN=''

# nx_etcd_option OPTION [VALUE]: take one of the options above; status 1 where it is none of them.
nx_etcd_option() {
  case "$1" in
    --prefix | --user | --password-file | --cacert | --cert | --key) nx_option_value "$1" $# ;;
    *) return 1 ;;
  esac
  case "$1" in
    --prefix) NX_ETCD_PREFIX="$2" ;;
    --user) NX_ETCD_USER="$2" ;;
    --password-file) NX_ETCD_PASSWORD_FILE="$2" ;;
    --cacert) NX_ETCD_CA="$2" ;;
    --cert) NX_ETCD_CERT="$2" ;;
    --key) NX_ETCD_KEY="$2" ;;
  esac
}

# nx_etcd_post URL PATH JSON: the answer's body; status 1 with etcd's words on stderr.
nx_etcd_post() {
  local -a options
  local answer status message
  options=(--silent --show-error --max-time 10 --connect-timeout 3 --request POST --write-out '\n%{http_code}')
  options+=(--header 'Content-Type: application/json')
  [[ -z "$NX_ETCD_CA" ]] || options+=(--cacert "$NX_ETCD_CA")
  [[ -z "$NX_ETCD_CERT" ]] || options+=(--cert "$NX_ETCD_CERT")
  [[ -z "$NX_ETCD_KEY" ]] || options+=(--key "$NX_ETCD_KEY")
  answer="$(printf '%s' "$3" | curl "${options[@]}" --data-binary @- \
    --config <([[ -z "$NX_ETCD_TOKEN" ]] || nx_curl_header Authorization "$NX_ETCD_TOKEN") "$1$2")" || return 1
  status="${answer##*$'\n'}"
  answer="${answer%$'\n'*}"
  if [[ "$status" != 200 ]]; then
    message="$(printf '%s' "$answer" | nx_json_get message)"
    nx_error "etcd at $1 answered $status: ${message:-$answer}"
    return 1
  fi
  printf '%s\n' "$answer"
}

# nx_etcd_open URLS: find an endpoint that answers, and log in where a user is given.
nx_etcd_open() {
  local urls="$1" one errors='' said password
  local -a list
  nx_need curl 'Install curl.'
  [[ "$NX_ETCD_PREFIX" == */ ]] || NX_ETCD_PREFIX="$NX_ETCD_PREFIX/"
  IFS=, read -r -a list <<<"$urls"
  for one in ${list[@]+"${list[@]}"}; do
    one="${one// /}"
    one="${one%/}"
    [[ -n "$one" ]] || continue
    case "$one" in
      http://* | https://*) ;;
      *) nx_usage_error "'$one' is no URL of etcd; it looks like http://10.0.0.5:2379." ;;
    esac
    if [[ -z "$NX_ETCD_USER" ]]; then
      # Any range does: a denied one is an answer too, and says what is missing.
      if said="$(nx_etcd_post "$one" /v3/kv/range "{\"key\": \"$(printf '%s' "${NX_ETCD_PREFIX}services/" | nx_base64)\", \"count_only\": true}" 2>&1)"; then
        NX_ETCD_URL="$one"
        return 0
      fi
    else
      password="$(nx_etcd_password)" || exit "$?"
      if said="$(nx_etcd_post "$one" /v3/auth/authenticate \
        "{\"name\": $(nx_json_string "$NX_ETCD_USER"), \"password\": $(nx_json_string "$password")}" 2>&1)"; then
        NX_ETCD_URL="$one"
        NX_ETCD_TOKEN="$(printf '%s' "$said" | nx_json_get token)"
        return 0
      fi
    fi
    errors="$errors"$'\n'"      $one: $said"
  done
  nx_die "$NX_FAILED" "No etcd answers as it should:$errors" "Is the URL right and reachable from here, and are --user, --cacert as etcd wants them?"
}

nx_etcd_password() {
  if [[ -n "$NX_ETCD_PASSWORD_FILE" ]]; then
    [[ -r "$NX_ETCD_PASSWORD_FILE" ]] || nx_die "$NX_MISSING" "The password file $NX_ETCD_PASSWORD_FILE cannot be read."
    printf '%s' "$(cat "$NX_ETCD_PASSWORD_FILE")"
  elif [[ -n "${ETCD_PASSWORD:-}" ]]; then
    printf '%s' "$ETCD_PASSWORD"
  else
    nx_die "$NX_USAGE" "No password for etcd's user $NX_ETCD_USER." "Give --password-file FILE, or set ETCD_PASSWORD."
  fi
}

# nx_etcd_put KEY VALUE
nx_etcd_put() {
  nx_etcd_post "$NX_ETCD_URL" /v3/kv/put \
    "{\"key\": \"$(printf '%s' "$1" | nx_base64)\", \"value\": \"$(printf '%s' "$2" | nx_base64)\"}" >/dev/null
}

# nx_etcd_get KEY: its value; status 1 where there is none.
nx_etcd_get() {
  local answer value
  answer="$(nx_etcd_post "$NX_ETCD_URL" /v3/kv/range "{\"key\": \"$(printf '%s' "$1" | nx_base64)\"}")" || exit "$NX_FAILED"
  value="$(printf '%s' "$answer" | nx_json_get kvs.0.value)"
  [[ -n "$value" ]] || return 1
  printf '%s' "$value" | nx_unbase64
}

# nx_etcd_delete KEY: how many keys went.
nx_etcd_delete() {
  nx_etcd_post "$NX_ETCD_URL" /v3/kv/deleterange "{\"key\": \"$(printf '%s' "$1" | nx_base64)\"}" | nx_json_get deleted
}

# nx_etcd_list PREFIX (it ends with a slash): a line KEY<TAB>LEASE<TAB>VALUE for each key; newlines and tabs in a value become blanks, which JSON
# does not mind between its tokens. A lease of 0: the key stays until it is removed.
nx_etcd_list() {
  local begin="$1" end="${1%/}0" answer key lease value
  answer="$(nx_etcd_post "$NX_ETCD_URL" /v3/kv/range \
    "{\"key\": \"$(printf '%s' "$begin" | nx_base64)\", \"range_end\": \"$(printf '%s' "$end" | nx_base64)\"}")" || return 1
  printf '%s' "$answer" | nx_json | LC_ALL=C awk -F '\t' '
    { split($1, part, "."); gsub(/"/, "", $2) }
    part[1] == "kvs" && part[3] == "key" { if (key != "") print key, lease, value; key = $2; value = "-"; lease = 0 }
    part[1] == "kvs" && part[3] == "lease" { lease = $2 }
    part[1] == "kvs" && part[3] == "value" { value = $2 }
    END { if (key != "") print key, lease, value }' | while read -r key lease value; do
    [[ "$value" != - ]] || value=''
    printf '%s\t%s\t%s\n' "$(printf '%s' "$key" | nx_unbase64)" "$lease" "$(printf '%s' "$value" | nx_unbase64 | tr '\n\t\r' '   ')"
  done
}

# nx_check_http_url URL WHAT
nx_check_http_url() {
  case "$1" in
    *[[:space:]]* | *\"*) nx_usage_error "$2 '$1' holds blanks or quotes." ;;
    http://?* | https://?*) ;;
    *) nx_usage_error "$2 '$1' must begin with http:// or https://." ;;
  esac
  case "${1#*://}" in
    *@*) nx_usage_error "$2 must hold no user or password: everyone who reads etcd would see it." ;;
  esac
}
