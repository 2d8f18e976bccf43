# What the scripts share: Debian's packages, the virtual environment, a private token.
# shellcheck shell=bash

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv

# package | what shows that it is there | the scripts that need it, or all | what for
debian_packages() {
  cat <<'TABLE'
python3-venv         | module  ensurepip                           | all                   | makes the virtual environment
softhsm2             | command softhsm2-util                       | demo,serve,bench,test | the token
openssl              | command openssl                             | all                   | a client that is not ours
libnss3              | file    /usr/lib/*/libsoftokn3.so           | test                  | a second token
p11-kit              | file    /usr/libexec/p11-kit/p11-kit-server | test                  | a token in another process
p11-kit-modules      | file    /usr/lib/*/pkcs11/p11-kit-client.so | test                  | the client of that token
opencryptoki         | command pkcsslotd                           | test                  | a token that ignores templates
opensc-pkcs11        | file    /usr/lib/*/pkcs11-spy.so            | test                  | shows what a module is asked for
libtpm2-pkcs11-1     | file    /usr/lib/*/pkcs11/libtpm2_pkcs11.so | test                  | a token that cannot serve
libtpm2-pkcs11-tools | command tpm2_ptool                          | test                  | makes that token
libtss2-tcti-swtpm0  | file    /usr/lib/*/libtss2-tcti-swtpm.so.0  | test                  | its way to the TPM
swtpm                | command swtpm                               | test                  | the TPM, in software
tpm2-tools           | command tpm2_flushcontext                   | test                  | frees the TPM's memory
gcc                  | command gcc                                 | test                  | compiles the fault shim, the simulated SDF device
libc6-dev            | file    /usr/include/stdio.h                | test                  | headers for them
postgresql           | file    /usr/lib/postgresql/*/bin/initdb    | bench,test            | a second database
TABLE
}

say() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

# Usage: die STATUS MESSAGE
die() {
  say "$2"
  exit "$1"
}

# Makes the machine and the clone ready.
# Usage: prepare demo|serve|bench|test|fast|… LOCK, where LOCK is the name of a requirements/LOCK.txt
prepare() {
  [[ -e /dev/fd/0 ]] || exec </dev/null
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die 2 "needs Python 3.11 or newer as python3"
  install_missing_packages "$1"
  ensure_environment "$2"
  PATH=$VENV/bin:$PATH
}

# --- Debian's packages

is_there() {
  case $1 in
    module) python3 -c "import $2" 2>/dev/null ;;
    command) command -v "$2" >/dev/null ;;
    file) compgen -G "$2" >/dev/null ;;
  esac
}

# Prints 'PACKAGE (PURPOSE)' for each package that the script $1 needs and that is not there.
missing_packages() {
  local package kind what script purpose
  while IFS=' |' read -r package kind what script purpose; do
    [[ $script == all || ,$script, == *,"$1",* ]] || continue
    is_there "$kind" "$what" || printf '%s (%s)\n' "$package" "$purpose"
  done < <(debian_packages)
}

install_missing_packages() {
  local missing
  mapfile -t missing < <(missing_packages "$1")
  ((${#missing[@]})) || return 0
  say "missing here:$(printf '\n  %s' "${missing[@]}")"
  apt_install "${missing[@]%% *}"
}

apt_install() {
  command -v apt-get >/dev/null || die 2 "no apt-get here; install what Debian calls $*"
  ((EUID == 0)) || die 2 "only root can install that:
  sudo apt-get update && sudo apt-get install --no-install-recommends $*"

  say "installing from Debian: $*"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -q update >&2 || say "apt-get update failed; going on with the lists at hand"
  apt-get install --no-install-recommends --yes -qq \
    -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" >&2 ||
    die 1 "apt-get could not install $* (its reason is above)"
}

# --- The virtual environment

# The environment's stamp has a line 'KEY LOCK' for each lock whose packages are in it; without a
# stamp it was left half made. Usage: ensure_environment LOCK
ensure_environment() {
  local lock key stamp=$VENV/stamp made=
  exec {lock}<"$ROOT/pyproject.toml"
  flock -n "$lock" || { say "waiting for another script in this clone" && flock "$lock"; }

  key=$(environment_key)
  [[ ! -x $VENV/bin/python || ! -e $stamp ]] || made=$(<"$stamp")
  if ! grep -qxF "$key $1" <<<"$made"; then
    rm -f -- "$stamp"
    [[ $made == "$key "* ]] || { make_environment && made=; }
    install_locked "$1"
    printf '%s\n' ${made:+"$made"} "$key $1" >"$stamp"
  fi
  exec {lock}<&-
}

# The locks, and of each pyproject.toml what an installation reads: another lint rule makes no new
# environment.
environment_key() {
  { python3 -VV && printf '%s\n' "$ROOT" && cat -- "$ROOT"/requirements/*.txt && python3 -c '
import json, sys, tomllib
for path in sys.argv[1:]:
    read = tomllib.load(open(path, "rb"))
    print(json.dumps([read["build-system"], read["project"]], sort_keys=True))
' "$ROOT/pyproject.toml" "$ROOT"/examples/*/pyproject.toml; } | sha256sum | cut -c -64
}

make_environment() {
  say "making the virtual environment $VENV"
  python3 -m venv --clear "$VENV" >&2 || die 1 "could not make $VENV"
}

# Nothing is installed that no lock names: no dependency is resolved, and what has to be built is
# built by the locked build tools.
install_locked() {
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check -q install --no-deps)
  say "installing hsmwrap and requirements/$1.txt into it; the first time this takes a minute"
  "${pip[@]}" --require-hashes --only-binary :all: -r "$ROOT/requirements/build.txt" >&2 &&
    "${pip[@]}" --require-hashes --no-build-isolation -r "$ROOT/requirements/$1.txt" >&2 &&
    "${pip[@]}" --no-build-isolation --editable "$ROOT" >&2 &&
    # The examples are checked with the rest, and run by their users.
    { [[ $1 != dev ]] || "${pip[@]}" --no-build-isolation --editable "$ROOT/examples/sdf" >&2; } ||
    die 1 "pip could not install requirements/$1.txt (its reason is above)"
}

# Installs the client for Node.js that a test runs, by its lock. Without npm, or where npm cannot
# install it, that test is skipped.
ensure_node_client() {
  local lock clients=$ROOT/tests/clients directory=$VENV/node
  command -v npm >/dev/null || return 0
  exec {lock}<"$clients/package-lock.json"
  flock "$lock"
  if ! cmp -s -- "$clients/package-lock.json" "$directory/installed"; then
    say "installing tests/clients/package-lock.json by npm"
    mkdir -p -- "$directory"
    cp -- "$clients"/package*.json "$directory"
    if npm ci --prefix "$directory" --ignore-scripts --no-audit --no-fund --silent >&2; then
      cp -- "$clients/package-lock.json" "$directory/installed"
    else
      say "npm could not install it; going on without the client for Node.js"
      rm -rf -- "$directory"
    fi
  fi
  exec {lock}<&-
}

# --- The private token

# Runs a command on a token of its own, which is gone afterwards. Usage: on_private_token COMMAND...
on_private_token() {
  HSMWRAP_TOKEN_DIR=$(mktemp -d -t hsmwrap.XXXXXX) || return
  export HSMWRAP_TOKEN_DIR
  trap 'rm -rf -- "$HSMWRAP_TOKEN_DIR"' EXIT
  supervise "$ROOT/softhsm/init-token" "$@"
}

# Runs a command so that a signal ends it at once: for one in the foreground bash holds its traps
# back. A terminal sends SIGINT to the command by itself, and only once is right.
supervise() {
  local child status
  env --default-signal=INT,QUIT "$@" <&0 &
  child=$!
  trap 'kill -TERM "$child"' TERM HUP
  trap '[[ -t 0 ]] || kill -INT "$child"' INT
  while
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null
  do :; done
  trap - TERM HUP INT
  return "$status"
}
