# shellcheck shell=bash
# Sourced by the scripts beside it: how they complain, and how they come by system packages.
# PROGRAM is the name that messages begin with; the script that sources this sets it.

say() { printf '%s\n' "${@/#/"$PROGRAM: "}" >&2; }

fail() {
    say "$@"
    exit 1
}

# Only a machine that is thrown away afterwards is changed without asking.
may_install() { [[ -n "${CI:-}" && "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; }

# install_or_ask WHY PACKAGE...: in CI, as root, missing system packages are installed; elsewhere they are asked for.
install_or_ask() {
    local why=$1
    shift
    may_install || fail "$why; run: sudo apt-get install -y --no-install-recommends $*"
    say "$why; installing $*"
    export DEBIAN_FRONTEND=noninteractive
    # Another of these scripts, too: apt-get update waits for nobody.
    exec 8</var/lib/dpkg
    flock 8
    apt-get update -qq >&2
    start_nothing
    # Another installation on the machine is waited for.
    apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "$@" >&2 ||
        fail "apt-get could not install them"
    start_again
    exec 8<&-
}

# Debian's packages start what they bring, open to whoever gets there. Ours are started by our own scripts, closed.
POLICY=/usr/sbin/policy-rc.d
OWN_POLICY=''

start_nothing() {
    [[ ! -e "$POLICY" && -w "$(dirname "$POLICY")" ]] || return 0
    OWN_POLICY=$POLICY
    trap start_again EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

start_again() { [[ -z "$OWN_POLICY" ]] || rm -f "$OWN_POLICY"; }
