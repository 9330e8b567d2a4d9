#!/usr/bin/env bash
# Enter an HTTP service into etcd, move it, or remove it.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: register-service.sh [options] NAME BASE-URL ETCD-URL
       register-service.sh [options] --remove NAME ETCD-URL

Enters the HTTP service NAME, which listens at BASE-URL, into etcd; a worker of the kind `service` then serves it
(docs/reference/service-api.md). A name that is there already is moved to the new URL. Repeating it changes nothing.

  --metadata-url URL   where the service says what it serves (default: BASE-URL/v1/metadata)
  --check              ask the service for its metadata first, and refuse one that does not answer
  --remove             remove the record; the service itself is left alone
  --help               this text

HELP
  nx_etcd_help
  cat <<'HELP'
Needs curl. Exit: 0 done · 1 etcd or the service does not answer, or says no · 2 wrong use · 3 something is missing

  register-service.sh tts http://10.0.0.7:8080 http://10.0.0.5:2379
HELP
}

metadata_url='' check=false remove=false
words=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --metadata-url) nx_option_value "$1" $# && metadata_url="$2" && shift 2 ;;
    --check) check=true && shift ;;
    --remove) remove=true && shift ;;
    -*)
      nx_etcd_option "$@" || nx_usage_error "Unknown option $1."
      shift 2
      ;;
    *) words+=("$1") && shift ;;
  esac
done

check_name() {
  case "$1" in
    '' | */* | *[[:space:]]* | *\"* | *\\*) nx_usage_error "'$1' is no name of a service: no blanks, slashes, quotes." ;;
  esac
}

if [[ "$remove" == true ]]; then
  [[ ${#words[@]} -eq 2 ]] || nx_usage_error '--remove takes NAME and ETCD-URL.'
  check_name "${words[0]}"
  nx_etcd_open "${words[1]}"
  count="$(nx_etcd_delete "${NX_ETCD_PREFIX}services/${words[0]}")"
  if [[ "${count:-0}" == 0 ]]; then nx_ok "${words[0]} was not entered."; else nx_ok "${words[0]} is removed."; fi
  exit 0
fi

[[ ${#words[@]} -eq 3 ]] || nx_usage_error 'Three words are needed: NAME, BASE-URL and ETCD-URL.'
name="${words[0]}" base_url="${words[1]%/}"
check_name "$name"
nx_check_http_url "$base_url" 'The base URL'
metadata_url="${metadata_url:-$base_url/v1/metadata}"
nx_check_http_url "$metadata_url" 'The metadata URL'

if [[ "$check" == true ]]; then
  nx_need curl 'Install curl.'
  curl --silent --show-error --fail --max-time 10 --output /dev/null "$metadata_url" \
    || nx_die "$NX_FAILED" "$name does not say at $metadata_url what it serves." 'Is it running, and reachable from here?'
fi

nx_etcd_open "${words[2]}"
key="${NX_ETCD_PREFIX}services/$name"
record="{\"name\": $(nx_json_string "$name"), \"base_url\": $(nx_json_string "$base_url"), \"metadata_url\": $(nx_json_string "$metadata_url")}"
before="$(nx_etcd_get "$key")" || before=''
if [[ "$before" == "$record" ]]; then
  nx_ok "$name is entered already, at $base_url."
  exit 0
fi
nx_etcd_put "$key" "$record"
# What was written is read back: a proxy in front of etcd may have answered.
[[ "$(nx_etcd_get "$key")" == "$record" ]] || nx_die "$NX_FAILED" "$key is not what was written." 'Does somebody else write it?'
if [[ -z "$before" ]]; then nx_ok "$name is entered, at $base_url."; else nx_ok "$name is moved to $base_url."; fi
