#!/usr/bin/env bash
# List the HTTP services that are entered in etcd.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: list-services.sh [options] ETCD-URL

Lists the HTTP services that are entered in etcd: name, base URL, metadata URL.

  --json    one JSON list of objects: name, base_url, metadata_url (and state, with --check)
  --check   also ask each service for its metadata, and say whether it answers
  --help    this text

HELP
  nx_etcd_help
  cat <<'HELP'
Needs curl. Exit: 0 done · 1 etcd does not answer, or (with --check) a service does not · 2 wrong use · 3 something is missing
HELP
}

as_json=false check=false
words=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --json) as_json=true && shift ;;
    --check) check=true && shift ;;
    -*)
      nx_etcd_option "$@" || nx_usage_error "Unknown option $1."
      shift 2
      ;;
    *) words+=("$1") && shift ;;
  esac
done
[[ ${#words[@]} -eq 1 ]] || nx_usage_error 'One word is needed: ETCD-URL.'
nx_etcd_open "${words[0]}"
nx_temp_dir
nx_etcd_list "${NX_ETCD_PREFIX}services/" >"$NX_TMP/records"

result=0 separator='' rows=0
[[ "$as_json" == false ]] || printf '['
while IFS=$'\t' read -r key _ record; do
  name="${key#"${NX_ETCD_PREFIX}services/"}"
  base_url="$(printf '%s' "$record" | nx_json_get base_url)" || base_url=''
  metadata_url="$(printf '%s' "$record" | nx_json_get metadata_url)" || metadata_url=''
  if [[ -z "$base_url" ]]; then
    nx_warn "$key cannot be read as a service: Nexus leaves it out."
    continue
  fi
  metadata_url="${metadata_url:-${base_url%/}/v1/metadata}" state=''
  if [[ "$check" == true ]]; then
    state=answers
    curl --silent --fail --max-time 5 --output /dev/null "$metadata_url" || { state='no answer' && result=1; }
  fi
  if [[ "$as_json" == true ]]; then
    printf '%s{"name": %s, "base_url": %s, "metadata_url": %s' "$separator" \
      "$(nx_json_string "$name")" "$(nx_json_string "$base_url")" "$(nx_json_string "$metadata_url")"
    [[ "$check" == false ]] || printf ', "state": %s' "$(nx_json_string "$state")"
    printf '}'
    separator=', '
  else
    [[ "$rows" -gt 0 ]] || printf '%-24s %-36s %-48s %s\n' service 'base URL' 'metadata URL' "${state:+state}"
    printf '%-24s %-36s %-48s %s\n' "$name" "$base_url" "$metadata_url" "$state"
  fi
  rows=$((rows + 1))
done <"$NX_TMP/records"
if [[ "$as_json" == true ]]; then
  printf ']\n'
elif [[ "$rows" -eq 0 ]]; then
  nx_say "No service is entered under ${NX_ETCD_PREFIX}services/. Enter one: register-service.sh NAME BASE-URL ETCD-URL"
fi
exit "$result"
