#!/usr/bin/env bash
# Install what Nexus needs on a host: tools, Docker Engine with compose, on request the NVIDIA Container Toolkit.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'HELP'
Usage: install-host-deps.sh [options]

Installs what is missing, from the distribution and from Docker's and NVIDIA's own repositories, and asks before each step.
Debian, Ubuntu, Fedora, and macOS (with Homebrew). What is there stays as it is; repeat it at will.

  --yes           ask nothing
  --dry-run       print the commands that would be run, and run none
  --embedded      Python, make in the place of Docker: for `make up`
  --nvidia        also the NVIDIA Container Toolkit (the driver itself comes from your distribution or NVIDIA)
  --docker-group  let this user use Docker without sudo. Members of that group are root on this host
  --docker-desktop  macOS: Docker Desktop in the place of Colima (mind its license in companies)
  --help          this text

Commands that need root are run with sudo. Exit: 0 everything is there · 1 a command failed · 2 wrong use ·
3 this system is not known here: install Docker Engine 25 or newer and its compose plugin by hand,
https://docs.docker.com/engine/install/
HELP
}

dry=false embedded=false nvidia=false group=false desktop=false
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --yes | -y) NX_YES=true ;;
    --dry-run) dry=true ;;
    --embedded) embedded=true ;;
    --nvidia) nvidia=true ;;
    --docker-group) group=true ;;
    --docker-desktop) desktop=true ;;
    *) nx_usage_error "Unknown option $1." ;;
  esac
  shift
done

# --- What this host is ------------------------------------------------------------------------------------------------------

# NX_UNAME and NX_OS_RELEASE stand in for the host, in tests.
release() {
  (
    unset "$1"
    # shellcheck source=/dev/null
    . "${NX_OS_RELEASE:-/etc/os-release}" && printf '%s' "${!1:-}"
  ) 2>/dev/null
}

# FAMILY: debian, fedora or macos. DISTRIBUTION and CODENAME as Docker's repositories name them.
detect() {
  FAMILY='' DISTRIBUTION='' CODENAME=''
  case "${NX_UNAME:-$(uname -s)}" in
    Darwin)
      FAMILY=macos
      return 0
      ;;
    Linux) ;;
    *) return 1 ;;
  esac
  [[ -r "${NX_OS_RELEASE:-/etc/os-release}" ]] || return 1
  CODENAME="$(release VERSION_CODENAME)"
  case " $(release ID) $(release ID_LIKE) " in
    *' ubuntu '*)
      FAMILY=debian DISTRIBUTION=ubuntu
      # Mint and others name the Ubuntu that they are made of.
      CODENAME="$(release UBUNTU_CODENAME)"
      CODENAME="${CODENAME:-$(release VERSION_CODENAME)}"
      ;;
    *' raspbian '*) FAMILY=debian DISTRIBUTION=raspbian ;;
    *' debian '*)
      FAMILY=debian DISTRIBUTION=debian
      local theirs
      theirs="$(release DEBIAN_CODENAME)"
      CODENAME="${theirs:-$CODENAME}"
      ;;
    *' rhel '* | *' centos '*) FAMILY=fedora DISTRIBUTION=centos ;;
    *' fedora '*) FAMILY=fedora DISTRIBUTION=fedora ;;
    *) return 1 ;;
  esac
  [[ "$FAMILY" != debian || -n "$CODENAME" ]]
}

# --- Running ----------------------------------------------------------------------------------------------------------------

# do_it COMMAND…: shown, and run unless --dry-run. as_root COMMAND…: the same, with sudo where needed.
do_it() {
  printf '+ %s\n' "$*"
  [[ "$dry" == true ]] || "$@" || nx_die "$NX_FAILED" "This failed: $*" 'Mend it, and run install-host-deps.sh again: what is done stays done.'
}

as_root() {
  if [[ "$(id -u)" -eq 0 ]]; then
    do_it "$@"
  else
    [[ "$dry" == true ]] || nx_need sudo 'Run this script as root, or install sudo.'
    do_it sudo "$@"
  fi
}

# write_root FILE TEXT
write_root() {
  printf '+ write %s: %s\n' "$1" "$2"
  [[ "$dry" == true ]] && return 0
  if [[ "$(id -u)" -eq 0 ]]; then printf '%s\n' "$2" >"$1"; else printf '%s\n' "$2" | sudo tee "$1" >/dev/null; fi
}

# fetch_root URL FILE: a signing key, into a file that everyone may read.
fetch_root() {
  as_root curl --fail --silent --show-error --location --output "$2" "$1"
  as_root chmod a+r "$2"
}

# wanted WHAT: whether to go on with it.
wanted() {
  nx_step "$1"
  [[ "$dry" == true ]] || nx_confirm "Install it?" || { nx_warn "left out: $1" && return 1; }
}

missing() {
  local one
  for one in "$@"; do nx_has "$one" || printf '%s ' "$one"; done
}

# A test may say that a host has nothing: NX_ASSUME_BARE=true.
bare() { [[ "${NX_ASSUME_BARE:-false}" == true ]]; }

# --- The pieces -------------------------------------------------------------------------------------------------------------

install_tools() {
  local lacking
  lacking="$(missing curl openssl git)"
  if [[ -z "$lacking" ]] && ! bare; then
    nx_ok 'curl, openssl, git are there'
    return 0
  fi
  wanted 'curl, openssl, git' || return 0
  case "$FAMILY" in
    debian)
      as_root apt-get update -qq
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq ca-certificates curl openssl git
      ;;
    fedora) as_root dnf install -y curl openssl git ;;
    macos) do_it brew install curl openssl git ;;
  esac
}

has_python() {
  local one
  for one in python3 python3.14 python3.13 python3.12 python3.11; do
    ! nx_has "$one" || ! "$one" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 0
  done
  return 1
}

install_python() {
  if has_python && nx_has make && ! bare; then
    nx_ok 'Python 3.11 or newer and make are there'
    return 0
  fi
  wanted 'Python and make' || return 0
  case "$FAMILY" in
    debian)
      as_root apt-get update -qq
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq make python3 python3-venv
      ;;
    fedora) as_root dnf install -y make python3 ;;
    macos) do_it brew install make python@3.13 ;;
  esac
  [[ "$dry" == true ]] || has_python || nx_die "$NX_FAILED" "This system's Python is older than 3.11." 'Install a newer one beside it, and name it: make PYTHON=/path/to/python3.13 up'
}

has_docker() { nx_has docker && docker compose version >/dev/null 2>&1; }

install_docker() {
  if has_docker && ! bare; then
    nx_ok "Docker $(docker --version | sed 's/^Docker version //; s/,.*//') and compose $(docker compose version --short) are there"
    return 0
  fi
  if nx_has docker && ! bare && [[ "$FAMILY" == debian ]] && dpkg -s docker.io >/dev/null 2>&1; then
    nx_die "$NX_FAILED" "The distribution's docker.io is installed, which has no place beside Docker's own packages." \
      'Install its plugin (sudo apt install docker-compose-v2, where there is one), or remove it first: sudo apt remove docker.io containerd runc'
  fi
  wanted "Docker Engine and compose, from $([[ "$FAMILY" == macos ]] && echo Homebrew || echo download.docker.com)" || return 0
  local packages='docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin'
  case "$FAMILY" in
    debian)
      as_root install -m 0755 -d /etc/apt/keyrings
      fetch_root "https://download.docker.com/linux/$DISTRIBUTION/gpg" /etc/apt/keyrings/docker.asc
      write_root /etc/apt/sources.list.d/docker.list \
        "deb [arch=$(architecture) signed-by=/etc/apt/keyrings/docker.asc] https://download.docker.com/linux/$DISTRIBUTION $CODENAME stable"
      as_root apt-get update -qq
      # shellcheck disable=SC2086 # several words
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages
      ;;
    fedora)
      fetch_root "https://download.docker.com/linux/$DISTRIBUTION/docker-ce.repo" /etc/yum.repos.d/docker-ce.repo
      # shellcheck disable=SC2086
      as_root dnf install -y $packages
      ;;
    macos)
      if [[ "$desktop" == true ]]; then
        do_it brew install --cask docker
        do_it open -a Docker
      else
        do_it brew install colima docker docker-compose docker-buildx
        do_it mkdir -p "$HOME/.docker/cli-plugins"
        do_it ln -sfn "$(brew_prefix)/opt/docker-compose/bin/docker-compose" "$HOME/.docker/cli-plugins/docker-compose"
        do_it ln -sfn "$(brew_prefix)/opt/docker-buildx/bin/docker-buildx" "$HOME/.docker/cli-plugins/docker-buildx"
        do_it colima start --cpu 4 --memory 6 --disk 60
      fi
      return 0
      ;;
  esac
  if [[ -d /run/systemd/system ]] || [[ "$dry" == true ]]; then
    as_root systemctl enable --now docker
  else
    nx_warn 'There is no systemd: start the Docker daemon as this system does it.'
  fi
}

architecture() {
  if nx_has dpkg; then dpkg --print-architecture; else uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/'; fi
}

brew_prefix() { if nx_has brew; then brew --prefix; else echo /opt/homebrew; fi; }

join_group() {
  local user
  user="$(id -un)"
  if [[ "$FAMILY" == macos || "$user" == root ]]; then return 0; fi
  if id -nG "$user" | tr ' ' '\n' | grep -qx docker; then
    nx_ok "$user may use Docker"
  elif [[ "$group" == true ]]; then
    as_root usermod -aG docker "$user"
    nx_say "Log in again for it to take effect: $user is in the group docker now, which is as good as root."
  else
    nx_say "To use Docker without sudo: --docker-group. Members of that group are root on this host."
  fi
}

install_nvidia() {
  if nx_has nvidia-ctk && ! bare; then
    nx_ok 'the NVIDIA Container Toolkit is there'
  else
    [[ "$FAMILY" != macos ]] || nx_die "$NX_MISSING" 'Containers on macOS reach no NVIDIA card.' 'Run the inference server on the host itself, and a worker beside it.'
    nx_has nvidia-smi || nx_warn 'There is no NVIDIA driver yet (nvidia-smi): the toolkit is of no use without one.'
    wanted 'NVIDIA Container Toolkit, from nvidia.github.io' || return 0
    case "$FAMILY" in
      debian)
        as_root install -m 0755 -d /etc/apt/keyrings
        fetch_root https://nvidia.github.io/libnvidia-container/gpgkey /etc/apt/keyrings/nvidia-container-toolkit.asc
        write_root /etc/apt/sources.list.d/nvidia-container-toolkit.list \
          "deb [signed-by=/etc/apt/keyrings/nvidia-container-toolkit.asc] https://nvidia.github.io/libnvidia-container/stable/deb/$(architecture) /"
        as_root apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq nvidia-container-toolkit
        ;;
      fedora)
        fetch_root https://nvidia.github.io/libnvidia-container/stable/rpm/nvidia-container-toolkit.repo /etc/yum.repos.d/nvidia-container-toolkit.repo
        as_root dnf install -y nvidia-container-toolkit
        ;;
    esac
  fi
  if [[ "$dry" == true ]] || ! docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"nvidia"'; then
    as_root nvidia-ctk runtime configure --runtime=docker
    if [[ -d /run/systemd/system ]] || [[ "$dry" == true ]]; then as_root systemctl restart docker; fi
  fi
}

detect || nx_die "$NX_MISSING" "This system is not known here: $(release PRETTY_NAME || uname -s)." \
  'By hand: Docker Engine 25 or newer and its compose plugin, https://docs.docker.com/engine/install/'
nx_say "This is ${DISTRIBUTION:-$FAMILY}${CODENAME:+ $CODENAME}."
if [[ "$FAMILY" == macos && "$dry" == false ]]; then
  nx_need brew 'Install Homebrew first: https://brew.sh'
fi
install_tools
if [[ "$embedded" == true ]]; then
  install_python
else
  install_docker
  join_group
  [[ "$nvidia" == false ]] || install_nvidia
fi
[[ "$dry" == true ]] || nx_ok 'Next: ./quickstart.sh'
