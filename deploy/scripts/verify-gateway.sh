#!/usr/bin/env bash
# Ask a running gateway for everything that it can do, and say what works.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: verify-gateway.sh [options] URL [KEY]

Checks a running gateway from outside, as its callers use it: probes, keys, models, chat (also streamed), completions,
embeddings, images, speech, transcription (of the speech just made), reranking, responses, jobs (submit, poll, result,
events), files and batches. What no model is there for, or the key may not do, is skipped and said so.

  KEY                a key with the scopes inference and jobs; better kept out of the list of processes by
                     --key-file FILE or the variable NEXUS_API_KEY
  --key-file FILE    holds the key
  --model WHAT=NAME  use this model for chat, completions, embeddings, images, speech, transcriptions or rerank
                     (default: the first in GET /v1/models that has the capability); may be repeated
  --skip NAME        leave a check out, by its name in the table; may be repeated
  --require NAME     fail, where this check would be skipped; may be repeated
  --wait SECONDS     first wait as long for /readyz to be 200 (default: 0)
  --timeout SECONDS  for one request (default: 120)
  --cacert FILE      authority of the certificate of an https URL (default: the system's)
  --json             one JSON object on standard output, and no table
  --help             this text

Needs bash and curl alone. Exit: 0 all that is up works · 1 something does not · 2 wrong use · 3 something is missing

  verify-gateway.sh --key-file .runtime/gateway/key http://127.0.0.1:8800
HELP
}

url='' key="${NEXUS_API_KEY:-}" wait_s=0 timeout_s=120 as_json=false
words=() chosen=() skipped=() required=() tls=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --json) as_json=true && shift && continue ;;
    --key-file | --model | --skip | --require | --wait | --timeout | --cacert) nx_option_value "$1" $# ;;
    -*) nx_usage_error "Unknown option $1." ;;
    *) words+=("$1") && shift && continue ;;
  esac
  case "$1" in
    --key-file)
      [[ -r "$2" ]] || nx_die "$NX_MISSING" "The key file $2 cannot be read."
      key="$(tr -d '\r\n' <"$2")"
      ;;
    --model)
      [[ "$2" == ?*=?* ]] || nx_usage_error '--model takes WHAT=NAME.'
      chosen+=("$2")
      ;;
    --skip) skipped+=("$2") ;;
    --require) required+=("$2") ;;
    --wait) wait_s="$2" ;;
    --timeout) timeout_s="$2" ;;
    --cacert) tls=(--cacert "$2") ;;
  esac
  shift 2
done
[[ ${#words[@]} -ge 1 && ${#words[@]} -le 2 ]] || nx_usage_error 'URL is needed, and KEY.'
url="${words[0]%/}"
url="${url%/v1}"
key="${words[1]:-$key}"
[[ "$url" == http://* || "$url" == https://* ]] || nx_usage_error "'$url' must begin with http:// or https://."
[[ -n "$key" ]] || nx_usage_error 'A key is needed: KEY, --key-file FILE, or NEXUS_API_KEY.'
[[ "$wait_s$timeout_s" != *[!0-9]* ]] || nx_usage_error '--wait and --timeout take whole seconds.'
nx_need curl 'Install curl.'
nx_temp_dir

# --- Requests and results -------------------------------------------------------------------------------------------------

failures=0 passes=0 skips=0
status='' took='' model=''
rows=''

# request METHOD PATH [CURL ARGUMENT…]: the body goes to $NX_TMP/body, headers to $NX_TMP/headers. `status` is 000 where
# no answer came. Whether an answer that broke off counts is the check's business: `broken` says so.
broken=''
request() {
  local method="$1" path="$2" said
  shift 2
  : >"$NX_TMP/body"
  broken=''
  said="$(curl --silent --show-error --globoff --max-time "$timeout_s" --connect-timeout 10 ${tls[@]+"${tls[@]}"} --request "$method" \
    --config <(nx_curl_header Authorization "Bearer $key") --output "$NX_TMP/body" --dump-header "$NX_TMP/headers" \
    --write-out '%{http_code} %{time_total}' ${@+"$@"} "$url$path" 2>"$NX_TMP/error")" || broken="$(cat "$NX_TMP/error")"
  status="${said%% *}"
  took="${said##* }"
}

# post PATH JSON [CURL ARGUMENT…]
post() {
  local path="$1"
  printf '%s' "$2" >"$NX_TMP/request"
  shift 2
  request POST "$path" --header 'Content-Type: application/json' --data-binary "@$NX_TMP/request" ${@+"$@"}
}

body_get() { nx_json_get "$1" <"$NX_TMP/body"; }

# row STATUS NAME DETAIL
row() {
  local detail="${3//[$'\n\r\t']/ }"
  case "$1" in
    pass) passes=$((passes + 1)) ;;
    fail) failures=$((failures + 1)) ;;
    skip) skips=$((skips + 1)) ;;
  esac
  if [[ "$as_json" == true ]]; then
    rows="$rows${rows:+, }{\"name\": $(nx_json_string "$2"), \"status\": \"$1\", \"model\": $(nx_json_string "$model"), \"seconds\": ${took:-0}, \"detail\": $(nx_json_string "$detail")}"
    return 0
  fi
  local color="$NX_GREEN"
  [[ "$1" != fail ]] || color="$NX_RED"
  [[ "$1" != skip ]] || color="$NX_YELLOW"
  [[ -t 1 ]] || color=''
  printf '%s%-5s%s %-15s %8s  %-28s %s\n' "$color" "$1" "${color:+$NX_PLAIN}" "$2" "${took:+$(LC_ALL=C printf '%.2f' "$took")}" "${model:--}" "${detail:0:160}"
}

named() {
  local wanted="$1" one
  shift
  for one in ${@+"$@"}; do [[ "$one" != "$wanted" ]] || return 0; done
  return 1
}

pass() { row pass "$check" "${1:-}"; }
fail() { row fail "$check" "$1"; }
skip() {
  took=''
  if named "$check" ${required[@]+"${required[@]}"}; then fail "required, but $1"; else row skip "$check" "$1"; fi
}

# begin NAME: status 1 where the check is left out.
begin() {
  check="$1" took='' model=''
  ! named "$1" ${skipped[@]+"${skipped[@]}"}
}

# what_came: why this answer is none that was hoped for.
what_came() {
  local message
  if [[ "$status" == 000 || -n "$broken" ]]; then
    printf '%s' "${broken:-no answer}"
    return 0
  fi
  message="$(body_get error.message)" || message=''
  printf 'status %s: %s' "$status" "${message:-$(head -c 200 "$NX_TMP/body" | tr -d '\000')}"
}

# expect STATUS: else the check has failed, or is skipped where the key may not.
expect() {
  [[ "$status" != "$1" || -n "$broken" ]] || return 0
  if [[ "$status" == 403 ]]; then
    skip "this key may not: $(body_get error.message)"
  else
    fail "$(what_came)"
  fi
  return 1
}

# model_for CAPABILITY: sets `model`; else the check is skipped.
model_for() {
  local one
  for one in ${chosen[@]+"${chosen[@]}"}; do
    if [[ "${one%%=*}" == "$1" ]]; then
      model="${one#*=}"
      return 0
    fi
  done
  model="$(awk -F '\t' -v capability="$1" '$1 == capability { print $2; exit }' "$NX_TMP/models")"
  [[ -n "$model" ]] || { skip "no model for $1 is up" && return 1; }
}

# --- Checks ---------------------------------------------------------------------------------------------------------------

check_probe() {
  begin health && { request GET /health && expect 200 && pass; }
  begin readyz || return 0
  request GET /readyz
  expect 200 || return 0
  local state parts
  state="$(body_get status)"
  if [[ "$state" == ready ]]; then
    pass "$state"
  else
    parts="$(nx_json <"$NX_TMP/body" | awk -F '\t' '
      $1 ~ /^parts\..*\.error$/ && $2 != "null" { split($1, part, "."); printf "%s: %s ", part[2], $2 }')"
    fail "$state: $parts"
  fi
}

check_keys() {
  local right="$key"
  begin wrong-key || return 0
  key="nexus-no-such-key-$$"
  request GET /v1/models
  key="$right"
  if [[ "$status" == 401 ]]; then
    pass "401 $(body_get error.code)"
  else
    fail "a wrong key was answered with $status, not 401"
  fi
}

# A line CAPABILITY<TAB>MODEL<TAB>FIRST VOICE for each; models go before aliases.
check_models() {
  check=models took='' model=''
  : >"$NX_TMP/models"
  request GET /v1/models
  expect 200 || return 1
  if ! nx_json <"$NX_TMP/body" >"$NX_TMP/flat"; then
    fail 'the answer is no JSON'
    return 1
  fi
  awk -F '\t' '
    { split($1, part, "."); here = part[1] == "data" ? part[2] : "" }
    here == "" { next }
    part[3] == "id" { id[here] = $2; count = here + 1 }
    part[3] == "voices" && part[4] == 0 { voice[here] = $2 }
    part[3] == "alias_for" { alias[here] = 1 }
    part[3] == "capabilities" && $2 != "[]" { gsub(/"/, "", $2); can[here] = can[here] " " $2 }
    END {
      for (round = 0; round < 2; round++) for (one = 0; one < count; one++) if (alias[one] + 0 == round) {
        n = split(can[one], list, " ")
        for (i = 1; i <= n; i++) print list[i] "\t" id[one] "\t" voice[one]
      }
    }' "$NX_TMP/flat" | while IFS=$'\t' read -r capability id voice; do
    printf '%s\t%s\t%s\n' "$capability" "$(printf '%s\n' "$id" | nx_json_text)" "$(printf '%s\n' "$voice" | nx_json_text)"
  done >"$NX_TMP/models"
  if [[ ! -s "$NX_TMP/models" ]]; then
    skip 'no model is up: start a worker, see GET /v1/workers'
    return 0
  fi
  pass "$(cut -f2 "$NX_TMP/models" | sort -u | awk 'END { print NR }') up, for $(cut -f1 "$NX_TMP/models" | sort -u | tr '\n' ' ')"
  check=unknown-model took=''
  begin unknown-model || return 0
  post /v1/chat/completions '{"model": "no-such-model-of-nexus", "messages": [{"role": "user", "content": "hi"}]}'
  if [[ "$status" == 404 ]]; then pass "404 $(body_get error.code)"; else fail "$(what_came)"; fi
}

chat_body() {
  printf '{"model": %s, "messages": [{"role": "user", "content": "Say hello in one word."}], "max_tokens": 32%s}' "$(nx_json_string "$model")" "${1:-}"
}

check_chat() {
  local text
  begin chat && model_for chat && {
    post /v1/chat/completions "$(chat_body)"
    if expect 200; then
      text="$(body_get choices.0.message.content)"
      # One that thinks may have spent its tokens on that.
      text="${text:-$(body_get choices.0.finish_reason)}"
      if [[ -n "$text" ]]; then pass "$text"; else fail "no choice in the answer: $(head -c 200 "$NX_TMP/body")"; fi
    fi
  }
  begin chat-stream && model_for chat && {
    post /v1/chat/completions "$(chat_body ', "stream": true')" --no-buffer
    expect 200 && check_stream
  }
  return 0
}

# Each frame must be JSON with a choice and no error, and [DONE] the last: a stream that only ends is a broken one.
check_stream() {
  local last frames
  tr -d '\r' <"$NX_TMP/body" | sed -n 's/^data: //p' >"$NX_TMP/frames"
  last="$(tail -n 1 "$NX_TMP/frames")"
  frames="$(grep -c '"choices"' "$NX_TMP/frames" || true)"
  if grep -q '^{"error"' "$NX_TMP/frames"; then
    fail "an error in the stream: $(grep '^{"error"' "$NX_TMP/frames" | head -n 1 | nx_json_get error.message)"
  elif [[ "$last" != '[DONE]' ]]; then
    fail "the stream does not end in [DONE] but in: ${last:-nothing}"
  elif [[ "$frames" -eq 0 ]]; then
    fail 'the stream holds no chunk'
  else
    pass "$frames chunks, [DONE]"
  fi
}

check_completions() {
  begin completions && model_for completions || return 0
  post /v1/completions "{\"model\": $(nx_json_string "$model"), \"prompt\": \"Once upon a time\", \"max_tokens\": 16}"
  expect 200 || return 0
  if [[ -n "$(body_get choices.0.finish_reason)" ]]; then pass "$(body_get choices.0.text)"; else fail "no choice in the answer: $(head -c 200 "$NX_TMP/body")"; fi
}

check_embeddings() {
  local length
  begin embeddings && model_for embeddings || return 0
  post /v1/embeddings "{\"model\": $(nx_json_string "$model"), \"input\": \"The quick brown fox\", \"encoding_format\": \"float\"}"
  expect 200 || return 0
  length="$(nx_json <"$NX_TMP/body" | grep -cE '^data\.0\.embedding\.[0-9]+'$'\t''-?[0-9]' || true)"
  if [[ "$length" -gt 0 ]]; then pass "$length numbers"; else fail "no numbers in the answer: $(head -c 200 "$NX_TMP/body")"; fi
}

check_images() {
  local bytes
  begin images && model_for images || return 0
  post /v1/images/generations "{\"model\": $(nx_json_string "$model"), \"prompt\": \"a red fox\", \"n\": 1}"
  expect 200 || return 0
  body_get data.0.b64_json | nx_unbase64 >"$NX_TMP/picture" 2>/dev/null || true
  bytes="$(wc -c <"$NX_TMP/picture" | tr -d ' ')"
  case "$(head -c 12 "$NX_TMP/picture" | od -An -tx1 | tr -d ' \n')" in
    89504e47*) pass "PNG, $bytes bytes" ;;
    ffd8ff*) pass "JPEG, $bytes bytes" ;;
    52494646*57454250) pass "WebP, $bytes bytes" ;;
    *)
      if [[ -n "$(body_get data.0.url)" ]]; then pass 'a URL'; else fail "no picture in the answer ($bytes bytes)"; fi
      ;;
  esac
}

# A second of silence, 16 kHz, 16 bit, mono: for transcription where nothing speaks.
silence() {
  printf 'RIFF\044\175\000\000WAVEfmt \020\000\000\000\001\000\001\000\200\076\000\000\000\175\000\000\002\000\020\000data\000\175\000\000'
  head -c 32000 /dev/zero
}

check_sound() {
  local bytes voice text spoken=false
  silence >"$NX_TMP/sound.wav"
  begin speech && model_for speech && {
    voice="$(NX_NAME="$model" awk -F '\t' '$1 == "speech" && $2 == ENVIRON["NX_NAME"] { print $3; exit }' "$NX_TMP/models")"
    post /v1/audio/speech "{\"model\": $(nx_json_string "$model"), \"voice\": $(nx_json_string "${voice:-alloy}"), \"input\": \"The quick brown fox jumps over the lazy dog.\", \"response_format\": \"wav\"}"
    if expect 200; then
      bytes="$(wc -c <"$NX_TMP/body" | tr -d ' ')"
      if [[ "$(head -c 4 "$NX_TMP/body" | tr -d '\000')" == RIFF && "$bytes" -gt 44 ]]; then
        cp "$NX_TMP/body" "$NX_TMP/sound.wav"
        spoken=true
        pass "WAV, $bytes bytes"
      else
        fail "$bytes bytes that are no WAV"
      fi
    fi
  }
  begin transcription && model_for transcriptions && {
    request POST /v1/audio/transcriptions --form-string "model=$model" --form "file=@$NX_TMP/sound.wav;type=audio/wav"
    if expect 200; then
      text="$(body_get text)"
      if [[ -n "$text" ]]; then
        pass "$text"
      elif [[ "$spoken" == false ]] && grep -q '"text"' "$NX_TMP/body"; then
        pass 'nothing, of silence'
      else
        fail "no text of what was spoken: $(head -c 200 "$NX_TMP/body")"
      fi
    fi
  }
  return 0
}

check_rerank() {
  local score
  begin rerank && model_for rerank || return 0
  post /v1/rerank "{\"model\": $(nx_json_string "$model"), \"query\": \"a fox\", \"documents\": [\"a red fox\", \"a blue car\"]}"
  expect 200 || return 0
  score="$(body_get results.0.relevance_score)"
  if [[ -n "$score" ]]; then pass "first: document $(body_get results.0.index), $score"; else fail "no result in the answer: $(head -c 200 "$NX_TMP/body")"; fi
}

check_responses() {
  begin responses && model_for chat || return 0
  post /v1/responses "{\"model\": $(nx_json_string "$model"), \"input\": \"Say hello in one word.\", \"max_output_tokens\": 32, \"store\": false}"
  expect 200 || return 0
  case "$(body_get status)" in
    completed | incomplete) pass "$(body_get status)" ;;
    *) fail "its status is '$(body_get status)'" ;;
  esac
}

# whatever_can: the endpoint and body of a cheap request, of what is up, in ENDPOINT and BODY.
whatever_can() {
  ENDPOINT='' BODY=''
  if awk -F '\t' '$1 == "chat" { found = 1 } END { exit !found }' "$NX_TMP/models" && model_for chat; then
    ENDPOINT=/v1/chat/completions BODY="$(chat_body)"
  elif awk -F '\t' '$1 == "embeddings" { found = 1 } END { exit !found }' "$NX_TMP/models" && model_for embeddings; then
    ENDPOINT=/v1/embeddings BODY="{\"model\": $(nx_json_string "$model"), \"input\": \"a fox\"}"
  elif awk -F '\t' '$1 == "speech" { found = 1 } END { exit !found }' "$NX_TMP/models" && model_for speech; then
    ENDPOINT=/v1/audio/speech BODY="{\"model\": $(nx_json_string "$model"), \"input\": \"hello\", \"voice\": \"alloy\"}"
  else
    skip 'no model for chat, embeddings or speech is up'
    return 1
  fi
}

check_jobs() {
  local id state began until
  begin job && whatever_can || return 0
  began="$SECONDS" until=$((SECONDS + timeout_s))
  post /v1/jobs "{\"endpoint\": \"$ENDPOINT\", \"body\": $BODY, \"metadata\": {\"made_by\": \"verify-gateway\"}}"
  expect 202 || return 0
  id="$(body_get id)"
  [[ -n "$id" ]] || { fail 'the 202 names no job' && return 0; }
  state=queued
  while [[ "$state" == queued || "$state" == in_progress ]]; do
    [[ "$SECONDS" -lt "$until" ]] || { fail "$id is still $state after $timeout_s s" && return 0; }
    request GET "/v1/jobs/$id?wait=10"
    expect 200 || return 0
    state="$(body_get status)"
  done
  took=$((SECONDS - began))
  [[ "$state" == completed ]] || { fail "$id ended as ${state:-nothing}: $(body_get error.message)" && return 0; }
  pass "$id completed"

  begin job-result && {
    request GET "/v1/jobs/$id/result"
    if expect 200; then
      if [[ -s "$NX_TMP/body" ]]; then pass "$(wc -c <"$NX_TMP/body" | tr -d ' ') bytes"; else fail 'the result is empty'; fi
    fi
  }
  begin job-events || return 0
  request GET "/v1/jobs/$id/events" --no-buffer
  expect 200 || return 0
  if grep -q '^event: job.completed' "$NX_TMP/body"; then
    pass "$(grep -c '^event:' "$NX_TMP/body") events, the last job.completed"
  else
    fail "no job.completed among the events: $(grep '^event:' "$NX_TMP/body" | tail -n 1)"
  fi
}

check_files() {
  local file batch state began until output
  begin file && {
    printf '{"custom_id": "one", "method": "POST", "url": "%s", "body": %s}\n' "${ENDPOINT:-/v1/chat/completions}" "${BODY:-{\}}" >"$NX_TMP/batch.jsonl"
    request POST /v1/files --form purpose=batch --form "file=@$NX_TMP/batch.jsonl;type=application/jsonl"
    expect 200 || return 0
    file="$(body_get id)"
    request GET "/v1/files/$file/content"
    if expect 200; then
      if cmp -s "$NX_TMP/batch.jsonl" "$NX_TMP/body"; then pass 'the same bytes came back'; else fail 'other bytes came back than were sent'; fi
    fi
  } || return 0
  if ! begin batch || ! whatever_can; then
    remove_files "$file"
    return 0
  fi
  began="$SECONDS" until=$((SECONDS + timeout_s)) output=''
  post /v1/batches "{\"input_file_id\": \"$file\", \"endpoint\": \"$ENDPOINT\", \"completion_window\": \"24h\"}"
  if expect 200; then
    batch="$(body_get id)" state=validating
    while [[ "$state" == validating || "$state" == in_progress || "$state" == finalizing ]] && [[ "$SECONDS" -lt "$until" ]]; do
      sleep 1
      request GET "/v1/batches/$batch"
      [[ "$status" == 200 ]] || break
      state="$(body_get status)"
    done
    took=$((SECONDS - began)) output="$(body_get output_file_id)"
    if [[ "$status" != 200 ]]; then
      fail "$(what_came)"
    elif [[ "$state" != completed ]]; then
      fail "$batch is $state after $timeout_s s at most"
    elif [[ "$(body_get request_counts.completed)" != 1 ]]; then
      fail "$batch is completed, but its line failed"
    else
      pass "$batch completed"
    fi
  fi
  remove_files "$file" "$output"
}

# The verifier leaves nothing behind but a job's record.
remove_files() {
  local one
  for one in "$@"; do
    case "$one" in '' | null) ;; *) request DELETE "/v1/files/$one" ;; esac
  done
}

# --- All of them ------------------------------------------------------------------------------------------------------------

[[ "$as_json" == true ]] || printf '%-5s %-15s %8s  %-28s %s\n' '' check seconds model detail
if [[ "$wait_s" -gt 0 ]]; then
  nx_wait_http "$url/readyz" "$wait_s" ${tls[@]+"${tls[@]}"} || true
fi
check_probe
if [[ "$status" == 000 ]]; then
  nx_say "      Nothing answers at $url: the other checks are left out. Is the gateway running, and is this its address?"
else
  check_keys
  if check_models; then
    check_chat
    check_completions
    check_embeddings
    check_images
    check_sound
    check_rerank
    check_responses
    check_jobs
    check_files
  else
    nx_say '      The key does not open GET /v1/models: the other checks are left out.'
  fi
fi

if [[ "$as_json" == true ]]; then
  printf '{"url": %s, "ok": %s, "passed": %d, "failed": %d, "skipped": %d, "checks": [%s]}\n' \
    "$(nx_json_string "$url")" "$([[ "$failures" -eq 0 ]] && echo true || echo false)" "$passes" "$failures" "$skips" "$rows"
else
  printf '%d passed, %d failed, %d skipped\n' "$passes" "$failures" "$skips"
fi
[[ "$failures" -eq 0 ]] || exit "$NX_FAILED"
