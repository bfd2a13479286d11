#!/usr/bin/env bash
# The services of the production path on one machine, by one command: object store (infra/object_store.sh), database
# (PostgreSQL, reached by its socket only), tracker (MLflow's server with log-in, artifacts in S3) and monitoring
# (Prometheus, on loopback). docs/services.md says more.
#
#   infra/services.sh start            start what does not run, the first time make it; returns once all of it answers
#   infra/services.sh stop             stop it and wait for the end; the data stays
#   infra/services.sh restart          both
#   infra/services.sh status           what runs; exit code 0 if all of it does, 3 if not
#   infra/services.sh check            use each one: put and get, query, log in; exit code 3 if one does not serve
#   infra/services.sh backup DEST      databases and artifacts to a new folder in DEST (a folder or s3://BUCKET/PREFIX)
#   infra/services.sh restore FROM     bring such a folder back; --replace: in place of what is there, which is kept
#   infra/services.sh units            let systemd start, watch and restart it all from now on (units remove: no more)
#   infra/services.sh install          see to the system packages
#
# SERVICES            which ones (default: "object_store database tracker monitoring")
# SERVICES_DIR        everything that belongs to them: data, secrets, logs (default: outputs/services)
# SERVICES_HOST       the address of this machine on which S3 and MLflow listen (at first 127.0.0.1)
# SERVICES_ARTIFACTS  where MLflow's artifacts lie: s3://BUCKET/PREFIX or a folder (at first s3://mshnet/mlflow)
# SERVICES_TRACKER_PORT, SERVICES_MONITORING_PORT, OBJECT_STORE_PORT   at first 5000, 9090, 7480
# SERVICES_UNITS      user or system: whose systemd (default: system for root, else user)
# SERVICES_BACKUPS_KEPT   how many backups stay in one place (default: 7)
# MSHNET_SECRETS      the file with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, who gets to log in
#                     (default: ~/.mshnet/cluster.env); the environment's own win over it
#
# What `start` was given stays as it is until another `start` is given something else.
set -euo pipefail

PROGRAM=services
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=infra/packages.sh
source "$HERE/packages.sh"

DIR=$(realpath -m "${SERVICES_DIR:-$HERE/../outputs/services}")
SECRETS=$(realpath -m "${MSHNET_SECRETS:-$HOME/.mshnet/cluster.env}")
BIN=$(realpath -m "$HERE/../.venv/bin")
ALL="object_store database tracker monitoring" # in the order of starting
PACKAGES=(postgresql prometheus)
DATABASES=(mlflow mlflow_auth)
ROOT_DATABASES=/var/lib/mshnet # PostgreSQL refuses to run as root, and its own user cannot enter root's folders
# PostgreSQL's longest path of a socket, without the file's own name.
LONGEST_SOCKET_FOLDER=90

umask 077 # secrets and data are the owner's alone

# shellcheck source=infra/services/settings.sh
source "$HERE/services/settings.sh"
# shellcheck source=infra/services/processes.sh
source "$HERE/services/processes.sh"
# shellcheck source=infra/services/object_store.sh
source "$HERE/services/object_store.sh"
# shellcheck source=infra/services/database.sh
source "$HERE/services/database.sh"
# shellcheck source=infra/services/tracker.sh
source "$HERE/services/tracker.sh"
# shellcheck source=infra/services/monitoring.sh
source "$HERE/services/monitoring.sh"
# shellcheck source=infra/services/check.sh
source "$HERE/services/check.sh"
# shellcheck source=infra/services/backup.sh
source "$HERE/services/backup.sh"
# shellcheck source=infra/services/systemd.sh
source "$HERE/services/systemd.sh"

missing() {
    case "$1" in
        database) ! postgres_bin >/dev/null ;;
        monitoring) ! command -v prometheus >/dev/null ;;
        *) false ;;
    esac
}

install() {
    read_settings
    WHICH=${SERVICES:-$WHICH}
    ! wanted object_store || "$HERE/object_store.sh" install
    if missing database || missing monitoring; then
        install_or_ask "the services need PostgreSQL and Prometheus" "${PACKAGES[@]}"
    fi
}

# What is to run here.
in_order() {
    local name
    for name in $ALL; do
        ! wanted "$name" || { [[ "$name" == monitoring ]] && missing monitoring; } || echo "$name"
    done
}

start() {
    [[ -x "$BIN/mlflow" ]] || fail "no Python environment yet; run: make setup"
    claim_folder
    settle
    start_all
    ! wanted tracker || say "MLflow on http://$HOST:$TRACKER_PORT"
}

start_all() {
    local name
    if wanted monitoring && missing monitoring; then
        say "monitoring is left out: no Prometheus here (sudo apt-get install -y --no-install-recommends prometheus)"
    fi
    for name in $(in_order); do
        start_one "$name"
    done
    [[ -z "$UNITS" ]] || control start mshnet.target
}

start_one() {
    if [[ -n "$UNITS" ]]; then
        control start "mshnet@$1" || explain "$1" "systemd could not start $1"
    elif [[ "$1" == object_store ]]; then
        (read_secrets && object_store start)
    elif ! runs "$1"; then
        clear_away "$1"
        begin "$1"
    fi
    after "$1"
}

stop_one() {
    if [[ -n "$UNITS" ]]; then
        control stop "mshnet@$1"
    fi
    end "$1"
}

after() {
    case "$1" in
        database) make_databases ;;
        tracker) make_users ;;
    esac
}

# run NAME: in the foreground, for `begin` and for systemd; ready NAME: returns once it answers.
ready() {
    read_settings
    wait_until 240 answers "$1" || fail "$1 does not answer"
    after "$1"
}

run() {
    read_settings
    mkdir -p "$DIR"/{log,run}
    echo $$ >"$DIR/run/$1.pid"
    "run_$1"
}

end() {
    local pid name=$1
    if [[ "$name" == object_store ]]; then
        object_store stop
        return
    fi
    if runs "$name"; then
        pid=$(pid_of "$name")
        # PostgreSQL: end the sessions and write everything down; the others: end what is in flight.
        kill "-$([[ "$name" == database ]] && echo INT || echo TERM)" "$pid"
        wait_until "$([[ "$name" == database ]] && echo 60 || echo 15)" none_left "$name" ||
            say "$name (pid $pid) is slow to end"
    fi
    clear_away "$name"
}

stop() {
    [[ -f "$DIR/lock" ]] || return 0
    take_lock
    read_settings
    local name
    [[ -z "$UNITS" ]] || control stop mshnet.target
    for name in $(in_order | tac); do
        stop_one "$name"
    done
}

status() {
    read_settings
    local code=0 name
    for name in $(in_order); do
        if [[ "$name" == object_store ]]; then
            object_store status | grep -v '^folder' || code=3
            runs object_store || code=3
        elif ! runs "$name"; then
            printf '%-11s stopped\n' "$name"
            code=3
        elif ! answers "$name"; then
            printf '%-11s pid %s, no answer\n' "$name" "$(pid_of "$name")"
            code=3
        else
            printf '%-11s pid %s%s\n' "$name" "$(pid_of "$name")" "$(address_of "$name")"
        fi
    done
    if wanted monitoring && missing monitoring; then
        printf '%-11s left out: no Prometheus here\n' monitoring
    fi
    printf '%-11s %s%s\n' folder "$DIR" "${UNITS:+, kept running by systemd ($UNITS units)}"
    return "$code"
}

address_of() {
    case "$1" in
        database) echo ", $SOCKET" ;;
        tracker) echo ", http://$HOST:$TRACKER_PORT" ;;
        monitoring) echo ", http://127.0.0.1:$MONITORING_PORT" ;;
    esac
}

case "${1:-}" in
    start | stop | status | check | install) "$1" ;;
    backup | restore | units) "$@" ;;
    run | ready) "$@" ;;
    end)
        read_settings
        end "$2"
        ;;
    heal) heal ;;
    restart)
        stop
        start
        ;;
    *) fail "no such command '${1:-}' (start, stop, restart, status, check, backup, restore, units, install)" ;;
esac
