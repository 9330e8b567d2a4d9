#!/usr/bin/env bash
# Make the authority, the certificates and the passwords of docker-compose.prod.yml. What is there stays as it is.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: make-secrets.sh [options]

Makes, below ./.runtime/secrets, what docker-compose.prod.yml mounts: a certificate authority, a certificate for each of
NATS, etcd and Redis, one for each process that connects to etcd, and a password for each user of theirs. One folder for each process, with all that it needs and
nothing else: `worker` goes to the hosts of workers, `admin` is for people. Run it again whenever you like: what exists stays.

  --host NAME       a name or IP address by which workers on other hosts reach NATS and etcd; may be repeated. A name
                    that the certificates lack makes new ones
  --worker NAME     a NATS user and a folder `worker-NAME` of its own, for one worker. Its rights: those that
                    `nexus permissions worker NAME …` printed into secrets/nats/workers/NAME.conf, as an account of its own
  --rotate WHAT     make again: `passwords`, `certificates` (by the same authority), or one user's password, such as
                    `nats-worker`, `etcd-gateway`, `redis-gateway`. What to restart then: docs/how-to/operations.md
  --days N          how long certificates hold (default: 825; the authority ten years)
  --dir DIR         where (default: .runtime/secrets at the repository's root)
  --help            this text

Exit: 0 done · 1 it did not work · 2 wrong use · 3 openssl is missing
HELP
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
dir="$root/.runtime/secrets" days=825
hosts=() workers=() rotate=()
users=(nats-gateway nats-worker nats-monitor nats-admin nats-sys etcd-root etcd-gateway etcd-worker redis-gateway redis-admin)
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --host) nx_option_value "$1" $# && hosts+=("$2") && shift ;;
    --worker) nx_option_value "$1" $# && workers+=("$2") && shift ;;
    --rotate) nx_option_value "$1" $# && rotate+=("$2") && shift ;;
    --days) nx_option_value "$1" $# && days="$2" && shift ;;
    --dir) nx_option_value "$1" $# && dir="$2" && shift ;;
    *) nx_usage_error "Unknown option $1." ;;
  esac
  shift
done
[[ "$days" =~ ^[0-9]+$ && "$days" -gt 0 ]] || nx_usage_error "--days wants a number of days."
for name in ${workers[@]+"${workers[@]}"}; do
  [[ "$name" =~ ^[A-Za-z0-9_-]+$ ]] || nx_usage_error "'$name' cannot be a name in NATS: use [A-Za-z0-9_-]."
  case "$name" in gateway | worker | monitor | admin | sys) nx_usage_error "'$name' is a user already." ;; esac
done
for name in ${hosts[@]+"${hosts[@]}"}; do
  [[ "$name" =~ ^[A-Za-z0-9.:_-]+$ ]] || nx_usage_error "'$name' is no name and no address of a host."
done
nx_need openssl 'Install openssl.'

# Users of workers who were made earlier are users still.
for file in "$dir"/nats/workers/*.conf; do
  name="$(basename "$file" .conf)"
  [[ ! -s "$dir/worker-$name/nats-password" || " ${workers[*]-} " == *" $name "* ]] || workers+=("$name")
done
for name in ${rotate[@]+"${rotate[@]}"}; do
  case " passwords certificates ${users[*]} ${workers[*]+${workers[*]/#/nats-}} " in
    *" $name "*) ;;
    *) nx_usage_error "--rotate knows passwords, certificates, ${users[*]}, and nats-NAME of a worker that has a user, not '$name'." ;;
  esac
done

umask 077
mkdir -p "$dir"
chmod 700 "$dir"
nx_temp_dir

# wants WHAT…: one of these is to be made again.
wants() {
  local one asked
  for asked in ${rotate[@]+"${rotate[@]}"}; do
    for one in "$@"; do [[ "$asked" != "$one" ]] || return 0; done
  done
  return 1
}

# keep FILE: what is on stdin becomes the file, at once and whole.
keep() {
  mkdir -p "$(dirname "$1")"
  cat >"$1.new"
  chmod 600 "$1.new"
  mv "$1.new" "$1"
}

# password USER FILE…: one password, the same in each of these files.
password() {
  local user="$1" first="$dir/$2" file
  shift
  # etcd's root only when it is named: etcd must be told by somebody who still has the old password.
  if [[ ! -s "$first" ]] || wants "$user" || { [[ "$user" != etcd-root ]] && wants passwords; }; then
    openssl rand -hex 24 | keep "$first"
    nx_ok "password of $user"
  fi
  for file in "$@"; do [[ "$dir/$file" -ef "$first" ]] || keep "$dir/$file" <"$first"; done
}

authority() {
  [[ ! -s "$dir/ca/ca.key" || ! -s "$dir/ca/ca.crt" ]] || return 0
  mkdir -p "$dir/ca"
  openssl ecparam -name prime256v1 -genkey -noout | keep "$dir/ca/ca.key"
  openssl req -x509 -new -sha256 -key "$dir/ca/ca.key" -days 3650 -subj '/CN=Nexus authority' \
    -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign,cRLSign' | keep "$dir/ca/ca.crt"
  nx_ok 'certificate authority'
}

# names HOST…: as subjectAltName has them.
names() {
  local one text=''
  for one in "$@"; do
    if [[ "$one" =~ ^[0-9.]+$ || "$one" == *:* ]]; then text="$text,IP:$one"; else text="$text,DNS:$one"; fi
  done
  printf '%s' "${text#,}"
}

# certificate SERVICE HOST…: for a server; also a client's, since servers of a cluster are each other's clients.
certificate() {
  local service="$1" file="$dir/$1/$1" one lacks=false known text
  shift
  keep "$dir/$service/ca.crt" <"$dir/ca/ca.crt"
  if [[ -s "$file.crt" ]] && ! wants certificates && openssl verify -CAfile "$dir/ca/ca.crt" "$file.crt" >/dev/null 2>&1 &&
    openssl x509 -in "$file.crt" -noout -checkend 1209600 >/dev/null; then
    known="$(openssl x509 -in "$file.crt" -noout -ext subjectAltName)"
    for one in "$@"; do [[ "$known, " == *":$one,"* || "$known"$'\n' == *":$one"[[:space:]]* || "$known" == *"Address:$one" ]] || lacks=true; done
    [[ "$lacks" == true ]] || return 0
    # Names that were given earlier stay.
    while read -r one; do set -- "$@" "$one"; done < <(grep -oE '(DNS|IP Address):[^,[:space:]]+' <<<"$known" | sed -E 's/^(DNS|IP Address)://')
  fi
  openssl ecparam -name prime256v1 -genkey -noout | keep "$file.key"
  openssl req -new -sha256 -key "$file.key" -subj "/CN=$service" -out "$NX_TMP/request"
  # shellcheck disable=SC2046  # no name holds a blank
  text="$(names $(printf '%s\n' "$@" | sort -u))"
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n' \
    "$text" >"$NX_TMP/extensions"
  openssl x509 -req -sha256 -in "$NX_TMP/request" -CA "$dir/ca/ca.crt" -CAkey "$dir/ca/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -days "$days" -extfile "$NX_TMP/extensions" 2>/dev/null | keep "$file.crt"
  nx_ok "certificate of $service: $text"
}

# client_certificate FOLDER: what etcd asks of anyone who connects. It names nobody: etcd takes a common name for the name of a user.
client_certificate() {
  local file="$dir/$1/etcd-client"
  if [[ -s "$file.crt" && -s "$file.key" ]] && ! wants certificates && openssl verify -CAfile "$dir/ca/ca.crt" "$file.crt" >/dev/null 2>&1 &&
    openssl x509 -in "$file.crt" -noout -checkend 1209600 >/dev/null; then
    return 0
  fi
  mkdir -p "$dir/$1"
  openssl ecparam -name prime256v1 -genkey -noout | keep "$file.key"
  openssl req -new -sha256 -key "$file.key" -subj "/O=Nexus/OU=$1" -out "$NX_TMP/request"
  printf 'extendedKeyUsage=clientAuth\nkeyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n' >"$NX_TMP/extensions"
  openssl x509 -req -sha256 -in "$NX_TMP/request" -CA "$dir/ca/ca.crt" -CAkey "$dir/ca/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -days "$days" -extfile "$NX_TMP/extensions" 2>/dev/null | keep "$file.crt"
  nx_ok "client certificate of $1"
}

# NATS's accounts and users, with their passwords in the open: the file is nats-server's alone.
# shellcheck disable=SC2016  # the dollars are nats-server's
nats_accounts() {
  local name
  {
    printf '# Made by deploy/scripts/make-secrets.sh from deploy/nats/permissions.conf: nats-server knows variables within one file.\n'
    cat "$root/deploy/nats/permissions.conf"
    printf '\naccounts {\n  NEXUS {\n    jetstream: enabled\n    exports: $NEXUS_EXPORTS\n    users: [\n'
    printf '      { user: gateway, password: "%s", permissions: $NEXUS_GATEWAY }\n' "$(<"$dir/gateway/nats-password")"
    printf '      # For people: backup, restore, the `nats` command. It may do everything within this account.\n'
    printf '      { user: admin, password: "%s" }\n' "$(<"$dir/admin/nats-password")"
    printf '    ]\n  }\n'
    printf '  # For hosts that are trusted with every queue: processes with this user reach each other.\n'
    printf '  WORKER {\n    users: [ { user: worker, password: "%s", permissions: $NEXUS_WORKER } ]\n    imports: $NEXUS_WORKER_IMPORTS\n  }\n' \
      "$(<"$dir/worker/nats-password")"
    printf '  MONITOR {\n    users: [ { user: monitor, password: "%s", permissions: $NEXUS_MONITOR } ]\n    imports: $NEXUS_MONITOR_IMPORTS\n  }\n' \
      "$(<"$dir/monitor/nats-password")"
    printf '  # `nats server report …` needs it; no process of Nexus does.\n'
    printf '  SYS {\n    users: [ { user: sys, password: "%s" } ]\n  }\n' "$(<"$dir/admin/nats-sys-password")"
    for file in "$dir"/nats/workers/*.conf; do
      [[ -e "$file" ]] || continue
      name="$(basename "$file" .conf)"
      [[ -s "$dir/worker-$name/nats-password" ]] || nx_die "$NX_FAILED" "$file has no password." "Run: make-secrets.sh --worker $name"
      grep -q 'account: NEXUS' "$file" || nx_die "$NX_FAILED" "$file has no account: it was made by an earlier Nexus." \
        "Run \`nexus permissions worker $name …\` again, with the models of $name, into this file."
      # The one variable of the block is its password, which no list of processes shows.
      NX_PASSWORD="$(<"$dir/worker-$name/nats-password")" awk '
        match($0, /\$NATS_[A-Z0-9_]+_PASSWORD/) {
          $0 = substr($0, 1, RSTART - 1) "\"" ENVIRON["NX_PASSWORD"] "\"" substr($0, RSTART + RLENGTH)
        }
        { print "  " $0 }' "$file"
    done
    printf '}\n'
  } >"$NX_TMP/accounts.conf"
  keep "$dir/nats/accounts.conf" <"$NX_TMP/accounts.conf"
  # Before workers had accounts, one account's users were here.
  rm -f "$dir/nats/users.conf" "$dir/nats/sys.conf"
}

sha256() { openssl dgst -sha256 -r | cut -d ' ' -f 1; }

# Redis keeps digests. The gateway's rights: its own keys, and the commands that the store uses.
redis_users() {
  {
    printf 'user default off nopass resetkeys resetchannels -@all\n'
    printf 'user gateway on #%s resetkeys ~nexus:* resetchannels -@all +@read +@write +@scripting +@connection +time -@dangerous -keys\n' \
      "$(printf '%s' "$(<"$dir/gateway/redis-password")" | sha256)"
    printf 'user admin on #%s ~* &* +@all\n' "$(printf '%s' "$(<"$dir/admin/redis-password")" | sha256)"
  } | keep "$dir/redis/users.acl"
}

authority
certificate nats nats nats-1 nats-2 nats-3 localhost 127.0.0.1 ${hosts[@]+"${hosts[@]}"}
certificate etcd etcd etcd-1 etcd-2 etcd-3 localhost 127.0.0.1 ${hosts[@]+"${hosts[@]}"}
certificate redis redis localhost 127.0.0.1
for one in gateway worker monitor admin; do keep "$dir/$one/ca.crt" <"$dir/ca/ca.crt"; done
for one in gateway worker admin; do client_certificate "$one"; done
password nats-gateway gateway/nats-password
password nats-worker worker/nats-password
password nats-monitor monitor/nats-password
password nats-admin admin/nats-password
password nats-sys admin/nats-sys-password
password etcd-root admin/etcd-password
password etcd-gateway gateway/etcd-password admin/etcd-gateway-password
password etcd-worker worker/etcd-password admin/etcd-worker-password
password redis-gateway gateway/redis-password
password redis-admin admin/redis-password
for one in ${workers[@]+"${workers[@]}"}; do
  [[ -s "$dir/nats/workers/$one.conf" ]] || nx_die "$NX_FAILED" "There are no rights for $one." \
    "Run: mkdir -p $dir/nats/workers && nexus permissions worker $one --model MODEL >$dir/nats/workers/$one.conf"
  keep "$dir/worker-$one/ca.crt" <"$dir/ca/ca.crt"
  password "nats-$one" "worker-$one/nats-password"
done
for file in "$dir"/worker-*/; do
  [[ -d "$file" ]] || continue
  keep "${file}etcd-password" <"$dir/worker/etcd-password"
  client_certificate "$(basename "$file")"
done
nats_accounts
redis_users
nx_say "All there: $dir"
