#!/usr/bin/env bash
# Ask registries for the digests of the images in deploy/images.lock, and write them wherever the images are named.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: pin-images.sh [options]

Asks the registries which digest each image of deploy/images.lock has now, and writes it there and into every file that
names the image: compose files, manifests, values, Dockerfiles, workflows, .env.example. Only docker-compose.yml and
deploy/Dockerfile go on naming images by version (docker-compose.pinned.yml and NEXUS_PYTHON_IMAGE say why).

  --check      change nothing; status 1 where a digest is missing or another one than the registry's
  --json       print what the file holds as a list in JSON, for scan.yml; asks nobody
  --root DIR   the checkout (default: this one)
  --help       this text

Needs docker with buildx, and the registries. Look at what changed (`git diff`) and run the tests before you commit it.

Exit: 0 done · 1 it did not work, or (with --check) something is to be done · 2 wrong use · 3 docker is missing
HELP
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)" check=false json=false
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --check) check=true ;;
    --json) json=true ;;
    --root) nx_option_value "$1" $# && root="$2" && shift ;;
    *) nx_usage_error "Unknown option $1." ;;
  esac
  shift
done
lock="$root/deploy/images.lock"
[[ -r "$lock" ]] || nx_die "$NX_FAILED" "$lock cannot be read."

# entries: a line IMAGE DIGEST for each image; a dash where none is known.
entries() { grep -vE '^[[:space:]]*(#|$)' "$lock"; }

if [[ "$json" == true ]]; then
  entries | awk '{ printf "%s\"%s%s\"", (NR > 1 ? ", " : "["), $1, ($2 == "-" ? "" : "@" $2) } END { print "]" }'
  exit 0
fi

# The files that name images by digest.
files() {
  printf '%s\n' "$root"/docker-compose.*.yml "$root"/deploy/compose/*.yml "$root"/deploy/cluster/*.yml "$root"/deploy/kubernetes/*.yaml \
    "$root"/deploy/kubernetes/nexus/values.yaml "$root"/deploy/kubernetes/nexus/ci/*.yaml "$root"/deploy/service-template/Dockerfile \
    "$root"/.github/workflows/*.yml "$root"/.env.example
}

# write IMAGE DIGEST: in all of them, with whatever digest the image had.
write() {
  local pattern file
  pattern="$(printf '%s' "$1" | sed -E 's/[.]/\\./g')"
  while read -r file; do
    if [[ ! -f "$file" ]] || ! grep -qF "$1" "$file"; then continue; fi
    sed -E "s#${pattern}(@sha256:[0-9a-f]{64})?([^0-9A-Za-z._@-]|\$)#$1@$2\\2#g" "$file" >"$NX_TMP/file"
    cmp -s "$NX_TMP/file" "$file" || cat "$NX_TMP/file" >"$file"
  done < <(files)
  sed -E "s#^${pattern} .*#$1 $2#" "$lock" >"$NX_TMP/file"
  cat "$NX_TMP/file" >"$lock"
}

nx_need docker 'Install docker with buildx.'
nx_temp_dir
entries >"$NX_TMP/entries"
todo=0
while read -r image known; do
  if ! digest="$(docker buildx imagetools inspect "$image" --format '{{.Manifest.Digest}}' </dev/null 2>"$NX_TMP/error")"; then
    nx_error "$image: $(head -n 1 "$NX_TMP/error")"
    todo=1
    continue
  fi
  [[ "$digest" =~ ^sha256:[0-9a-f]{64}$ ]] || nx_die "$NX_FAILED" "$image: the registry says '$digest', which is no digest."
  if [[ "$digest" == "$known" ]]; then
    nx_ok "$image: as it was"
  elif [[ "$check" == true ]]; then
    nx_error "$image: the registry has $digest, deploy/images.lock $known"
    todo=1
  else
    write "$image" "$digest"
    nx_ok "$image: $digest"
  fi
done <"$NX_TMP/entries"
exit "$todo"
