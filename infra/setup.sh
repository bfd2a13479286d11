#!/usr/bin/env bash
# Make .venv from requirements.lock (no argument), or requirements.lock from .venv (`lock`), or see to the servers that
# tests are run against (`servers`). The Makefile calls this when the lock or pyproject.toml is newer than the
# environment, and before the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PROGRAM=setup
# shellcheck source=infra/packages.sh
source infra/packages.sh

VENV=.venv

# A name on PATH may be a shim that runs nothing, so each candidate is asked.
new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local candidate without_venv=
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || fail "PYTHON must be Python 3.11 or newer, got '$PYTHON'"
    fi
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python3.14}; do
        new_enough "$candidate" || continue
        if has_venv "$candidate"; then
            echo "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [[ -n "$without_venv" ]]; then
        local package
        package=$("$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        install_or_ask "$without_venv has no venv module" "$package"
        echo "$without_venv"
        return
    fi
    fail "Python 3.11 or newer is needed, found $(python3 --version 2>/dev/null || echo none)" \
        "Debian 12, Ubuntu 24.04 and newer have it: sudo apt-get install -y python3 python3-venv" \
        "elsewhere, install one and name it: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
    # Starting pip also finds out an environment that was moved or whose Python is gone.
    if "$VENV/bin/pip" --version >/dev/null 2>&1 && new_enough "$VENV/bin/python"; then
        return
    fi
    local python
    python=$(find_python)
    echo "setup: $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV"
}

pip_install() {
    local quiet=()
    [[ -t 2 ]] || quiet=(--quiet)
    "$VENV/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" "$@"
}

install() {
    make_venv
    echo "setup: $(grep -c '==' requirements.lock) packages of requirements.lock (the first time: minutes, about 6.5 GB)" >&2
    pip_install -r requirements.lock
    # setuptools is in the lock, so building the project needs nothing more.
    pip_install --no-deps --no-build-isolation -e .
    touch "$VENV/.installed"
}

write_lock() {
    [[ "$(uname -s)" == Linux ]] || fail "make the lock on Linux: elsewhere torch's CUDA packages are missing from it"
    make_venv
    pip_install -e '.[pipelines,page,dev]'
    local new=$VENV/requirements.lock.new
    {
        echo '# Names and versions that the tests pass with. Written by `make lock` from .venv; do not edit.'
        # The CUDA packages that torch names are for Linux alone; a local version (+cpu) is this machine's matter.
        "$VENV/bin/python" -m pip freeze --disable-pip-version-check --all --exclude-editable |
            grep -Ev '^(pip|mshnet)==|^(#|-e )' |
            sed -E -e 's/\+[a-zA-Z0-9.]+$//' -e '/^(nvidia-|cuda-|triton)/s/$/ ; sys_platform == "linux"/' |
            LC_ALL=C sort -f
    } >"$new"
    if grep -nE '@|://' "$new" >&2; then
        fail "the lines above name a place, not a version; install these packages by name and version first"
    fi
    mv "$new" requirements.lock
    touch "$VENV/.installed"
    echo "setup: $(grep -c '==' requirements.lock) packages in requirements.lock" >&2
}

# CI installs them and fails without. Anybody else is told what is left out.
see_to_servers() {
    infra/services.sh install && (see_to_hosts) && return
    ! may_install || exit 1
    say "until then, tests on real servers and on several hosts are skipped"
}

# Of tests/cluster: hosts as network namespaces, each with an ssh server of its own, and a browser.
see_to_hosts() {
    local program
    for program in ip ss nft unshare ssh sshd rsync chromium chromedriver; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null && continue
        install_or_ask "several hosts on this machine need $program" \
            iproute2 nftables util-linux openssh-client openssh-server rsync chromium chromium-driver
        return
    done
}

case "${1:-}" in
    '') install ;;
    lock) write_lock ;;
    servers) see_to_servers ;;
    *) fail "no such command '$1' (none, lock or servers)" ;;
esac
