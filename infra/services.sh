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

# --- settings: kept in the folder ---

read_settings() {
    WHICH=$ALL HOST=127.0.0.1 ARTIFACTS=s3://mshnet/mlflow TRACKER_PORT=5000 MONITORING_PORT=9090 DATABASE='' UNITS=''
    OBJECT_STORE=$DIR/object_store
    # shellcheck source=/dev/null
    [[ ! -f "$DIR/settings" ]] || source "$DIR/settings"
    SOCKET=$DATABASE/socket
}

write_settings() {
    declare -p WHICH HOST ARTIFACTS TRACKER_PORT MONITORING_PORT DATABASE UNITS | sed 's/^declare -- //' \
        >"$DIR/settings.new"
    mv "$DIR/settings.new" "$DIR/settings"
}

take_lock() {
    exec 9>"$DIR/lock"
    flock -w 600 9 || fail "another start or stop in '$DIR' takes too long"
}

claim_folder() {
    if [[ -d "$DIR" && -n "$(ls -A "$DIR")" && ! -f "$DIR/lock" ]]; then
        fail "'$DIR' holds something else; set SERVICES_DIR to an empty or new folder"
    fi
    (umask 022 && mkdir -p "$(dirname "$DIR")") # what lies beside it is not ours to close
    mkdir -p "$DIR"
    chmod 700 "$DIR"
    take_lock
    mkdir -p "$DIR"/{log,run,tracker,monitoring}
}

settle() {
    read_settings
    local name
    local before="$HOST $TRACKER_PORT $MONITORING_PORT $ARTIFACTS"
    WHICH=${SERVICES:-$WHICH} HOST=${SERVICES_HOST:-$HOST} ARTIFACTS=${SERVICES_ARTIFACTS:-$ARTIFACTS}
    TRACKER_PORT=${SERVICES_TRACKER_PORT:-$TRACKER_PORT} MONITORING_PORT=${SERVICES_MONITORING_PORT:-$MONITORING_PORT}
    for name in $WHICH; do
        [[ " $ALL " == *" $name "* ]] || fail "SERVICES must be some of '$ALL', got '$name'"
    done
    [[ "$HOST" =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ && "$HOST" != 0.0.0.0 ]] ||
        fail "SERVICES_HOST must be one IPv4 address of this machine, by which clients reach it, got '$HOST'"
    for name in TRACKER MONITORING; do
        local -n port=${name}_PORT
        [[ "$port" =~ ^[1-9][0-9]{0,4}$ ]] || fail "SERVICES_${name}_PORT must be a port number, got '$port'"
    done
    [[ "$ARTIFACTS" =~ ^(s3://[^/]+/.|/.) ]] ||
        fail "SERVICES_ARTIFACTS must be s3://BUCKET/PREFIX or a folder's whole path, got '$ARTIFACTS'"
    wanted object_store || ! wanted tracker || [[ "$ARTIFACTS" != s3://mshnet/mlflow ]] ||
        fail "SERVICES leaves the object store out; say where MLflow's artifacts lie: SERVICES_ARTIFACTS=s3://..."
    if [[ "$before" != "$HOST $TRACKER_PORT $MONITORING_PORT $ARTIFACTS" ]]; then
        for name in tracker monitoring; do
            ! runs "$name" || fail "$name runs with other settings ($before); stop it first"
        done
    fi
    if [[ -z "$DATABASE" ]] && wanted database; then
        DATABASE=$DIR/database
        if is_root; then
            (umask 022 && mkdir -p "$ROOT_DATABASES")
            DATABASE=$(mktemp -d "$ROOT_DATABASES/services.XXXXXX")
        fi
        SOCKET=$DATABASE/socket
        ((${#SOCKET} <= LONGEST_SOCKET_FOLDER)) || fail \
            "SERVICES_DIR is too long for PostgreSQL's socket: at most $((LONGEST_SOCKET_FOLDER - 16)) characters," \
            "got ${#DIR} in '$DIR'"
    fi
    write_settings
}

wanted() { [[ " $WHICH " == *" $1 "* ]]; }

is_root() { [[ "$(id -u)" == 0 ]]; }

# secret NAME: from the file of that name, which is made at the first time.
secret() {
    [[ -s "$DIR/tracker/$1" ]] || (od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$DIR/tracker/$1")
    cat "$DIR/tracker/$1"
}

# What clients have in their environment. A file of KEY=VALUE lines is read, not run.
read_secrets() {
    [[ -f "$SECRETS" ]] || return 0
    local key value
    while IFS='=' read -r key value; do
        case "$key" in
            MLFLOW_TRACKING_USERNAME | MLFLOW_TRACKING_PASSWORD | AWS_ACCESS_KEY_ID | AWS_SECRET_ACCESS_KEY)
                [[ -n "${!key:-}" ]] || export "$key=$value"
                ;;
        esac
    done <"$SECRETS"
}

# --- processes ---

pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null; }

home_of() {
    case "$1" in
        database) echo "$DATABASE/data" ;;
        *) echo "$DIR/$1" ;;
    esac
}

# members_of NAME: every process of it. Each works in its own folder, which also tells it from whatever else may have got
# its number after SIGKILL; a shell that somebody opened there is none of it.
members_of() {
    local folder link name
    folder=$(home_of "$1")
    for link in /proc/[0-9]*/cwd; do
        [[ "$(readlink "$link" 2>/dev/null)" == "$folder" ]] || continue
        name=$(tr '\0' ' ' 2>/dev/null <"${link%cwd}cmdline") || continue
        case "$1 $name" in
            database*postgres* | tracker*mlflow* | monitoring*prometheus*) link=${link%/cwd} && echo "${link##*/}" ;;
        esac
    done
}

runs() {
    local pid
    if [[ "$1" == object_store ]]; then
        object_store status >/dev/null 2>&1
        return
    fi
    pid=$(pid_of "$1") || return 1
    [[ -n "$pid" ]] && members_of "$1" | grep -x "$pid" >/dev/null
}

# wait_until SECONDS COMMAND...: tried until it succeeds; fails when the time is over.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.3
    done
}

explain() {
    say "$2; the end of its log:"
    tail -n 8 "$DIR/log/$1.log" >&2 || true
    fail "more in $DIR/log/$1.log"
}

none_left() { [[ -z "$(members_of "$1")" ]]; }

# What a killed process left behind holds its port or its data: the tracker's server, PostgreSQL's workers.
clear_away() {
    local pid
    for pid in $(members_of "$1"); do
        kill -TERM "$pid" 2>/dev/null || true
    done
    wait_until 10 none_left "$1" && return
    for pid in $(members_of "$1"); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait_until 20 none_left "$1" || fail "processes of $1 do not end: $(members_of "$1" | tr '\n' ' ')"
}

# Begin the piece in a session of its own, so that it outlives the shell, and without our lock.
begin() {
    local name=$1 log=$DIR/log/$1.log
    trim_log "$name"
    SERVICES_DIR=$DIR setsid "$0" run "$name" </dev/null >>"$log" 2>&1 9>&- &
    wait_until 180 answers_or_ended "$name" $! || explain "$name" "$name does not answer"
    answers "$name" || explain "$name" "$name ended"
}

# Whoever writes to it has it open, so it is copied away and emptied.
trim_log() {
    local log=$DIR/log/$1.log
    if [[ -f "$log" ]] && (($(stat -c %s "$log") > 16 << 20)); then
        cp "$log" "$log.1"
        : >"$log"
    fi
}

answers_or_ended() { answers "$1" || ! kill -0 "$2" 2>/dev/null; }

answers() {
    case "$1" in
        object_store) object_store status >/dev/null 2>&1 ;;
        database) query postgres 'select 1' >/dev/null 2>&1 ;;
        tracker) is_well "$HOST" "$TRACKER_PORT" /health ;;
        monitoring) is_well 127.0.0.1 "$MONITORING_PORT" /-/ready ;;
    esac
}

# is_well HOST PORT PATH: it answers there with 200.
is_well() {
    (
        exec 3<>"/dev/tcp/$1/$2"
        printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$3" >&3
        read -r -t 10 line <&3
        [[ "$line" == HTTP/*" 200"* ]]
    ) 2>/dev/null
}

# --- object store ---

object_store() {
    OBJECT_STORE_DIR=$OBJECT_STORE OBJECT_STORE_HOST=$HOST "$HERE/object_store.sh" "$@"
}

# Where S3 is: our own store by its profile, else wherever the usual environment leads.
use_storage() {
    if wanted object_store; then
        eval "$(object_store env)"
    else
        read_secrets
    fi
    export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
}

run_object_store() {
    # Three daemons that look after themselves; the one that ended is started again, the others go on.
    while (read_secrets && object_store start); do
        while object_store status >/dev/null; do sleep 5; done
    done
    fail "the object store does not start"
}

# --- database ---

postgres_bin() {
    local folder version='*'
    [[ ! -f "$DATABASE/data/PG_VERSION" ]] || version=$(cat "$DATABASE/data/PG_VERSION")
    # The newest; data that is there already stays with the version that made it.
    # shellcheck disable=SC2086
    folder=$(printf '%s\n' /usr/lib/postgresql/$version/bin | sort -V | tail -1)
    [[ -x "$folder/postgres" ]] || return 1
    echo "$folder"
}

as_database_user() {
    if is_root; then
        setpriv --reuid postgres --regid postgres --init-groups --inh-caps=-all -- "$@"
    else
        "$@"
    fi
}

psql() {
    PGCONNECT_TIMEOUT=10 timeout 60 "$(postgres_bin)/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$SOCKET" -U mshnet "$@"
}

# query DATABASE SQL
query() { psql -d "$1" -c "$2"; }

prepare_database() {
    local data=$DATABASE/data user bin
    bin=$(postgres_bin) || fail "no PostgreSQL (looked for /usr/lib/postgresql/*/bin/postgres); run: $0 install"
    mkdir -p "$DATABASE" "$SOCKET"
    ! is_root || chown postgres:postgres "$DATABASE" "$SOCKET"
    if [[ ! -d "$data" ]]; then
        # Whole once it has its name; what was killed before is made again.
        rm -rf "$data.new"
        (cd "$DATABASE" && as_database_user "$bin/initdb" -D "$data.new" --username mshnet --encoding UTF8 --no-locale \
            --data-checksums --auth reject >/dev/null) || fail "PostgreSQL's folder could not be made in '$DATABASE'"
        as_database_user mv "$data.new" "$data"
    fi
    user=$(id -un)
    # The kernel says who is at the other end of the socket: no password, and nobody else gets in.
    write_as_database_user pg_hba.conf 'local all mshnet peer map=mshnet'
    write_as_database_user pg_ident.conf "mshnet $user mshnet"
    write_as_database_user postgresql.conf "# Written at each start by infra/services.sh.
listen_addresses = ''
unix_socket_directories = '$SOCKET'
unix_socket_permissions = 0700
# What was acknowledged is on the disk. These are PostgreSQL's defaults; nothing may turn them off.
fsync = on
synchronous_commit = on
full_page_writes = on
max_connections = 60
shared_buffers = 64MB
log_line_prefix = '%t [%p] '
log_timezone = UTC
timezone = UTC"
    clear_away database
    # Nothing works on the data, so the number in here is nobody's, or somebody else's by now.
    rm -f "$data/postmaster.pid"
}

write_as_database_user() { printf '%s\n' "$2" | as_database_user tee "$DATABASE/data/$1" >/dev/null; }

run_database() {
    prepare_database
    cd "$DATABASE/data"
    if is_root; then
        exec setpriv --reuid postgres --regid postgres --init-groups --inh-caps=-all -- "$(postgres_bin)/postgres" -D .
    fi
    exec "$(postgres_bin)/postgres" -D .
}

make_databases() {
    local name
    for name in "${DATABASES[@]}"; do
        exists "$name" || query postgres "create database $name" 2>/dev/null || exists "$name"
    done
}

exists() { [[ -n "$(query postgres "select 1 from pg_database where datname = '$1'")" ]]; }

# --- tracker ---

database_uri() { echo "postgresql+psycopg2://mshnet@/$1?host=$("$BIN/python" -c \
    'import sys, urllib.parse; print(urllib.parse.quote(sys.argv[1], safe="/"))' "$SOCKET")"; }

run_tracker() {
    wait_until 120 answers database || fail "the database does not answer"
    make_databases
    clear_away tracker
    local password key users
    users=$(database_uri mlflow_auth)
    password=$(secret admin_password)
    key=$(secret session_key)
    cat >"$DIR/tracker/basic_auth.ini" <<INI
# Written at each start by infra/services.sh.
[mlflow]
# Who may log in may look at everything; what one made, one may change.
default_permission = READ
database_uri = ${users//%/%%}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Checking a password is slow on purpose; one that was right is believed for a minute.
auth_cache_ttl_seconds = 60
INI
    use_storage
    [[ "$ARTIFACTS" != /* ]] || mkdir -p "$ARTIFACTS"
    unset MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_REGISTRY_URI
    export MLFLOW_AUTH_CONFIG_PATH=$DIR/tracker/basic_auth.ini MLFLOW_AUTH_ADMIN_PASSWORD=$password
    export MLFLOW_FLASK_SERVER_SECRET_KEY=$key
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
    # A link to another site's page cannot use a log-in here, nor a name that somebody else points to this machine.
    local hosts="$HOST:$TRACKER_PORT,localhost:*,127.0.0.1:*"
    cd "$DIR/tracker"
    exec "$BIN/mlflow" server --app-name basic-auth --workers 1 --host "$HOST" --port "$TRACKER_PORT" \
        --backend-store-uri "$(database_uri mlflow)" --artifacts-destination "$ARTIFACTS" \
        --allowed-hosts "$hosts" --cors-allowed-origins "http://$HOST:$TRACKER_PORT"
}

# The users of the tracker: admin, by our own file, and whom the cluster's secrets name.
make_users() {
    read_secrets
    secret admin_password |
        "$BIN/python" "$HERE/tracker_users.py" "http://$HOST:$TRACKER_PORT" "$(database_dsn mlflow_auth)" ||
        fail "the tracker's users could not be made"
}

database_dsn() { echo "host='$SOCKET' user=mshnet dbname=$1"; }

# --- monitoring ---

run_monitoring() {
    cp "$HERE"/monitoring/{prometheus.yml,alerts.yml} "$DIR/monitoring/"
    write_targets
    cd "$DIR/monitoring"
    exec prometheus --config.file=prometheus.yml --storage.tsdb.path=data --web.listen-address="127.0.0.1:$MONITORING_PORT" \
        --storage.tsdb.retention.time=30d --storage.tsdb.retention.size=2GB --enable-feature=extra-scrape-metrics \
        --log.level=warn
}

write_targets() {
    local targets=()
    ! wanted tracker || targets+=("$(target tracker "$HOST:$TRACKER_PORT" /health)")
    ! wanted object_store || targets+=("$(target "object store" "$(object_store_address)" /)")
    (IFS=, && echo "[${targets[*]}]") >"$DIR/monitoring/services.json"
}

target() {
    printf '{"targets": ["%s"], "labels": {"service": "%s", "__metrics_path__": "%s"}}' "$2" "$1" "$3"
}

object_store_address() { object_store env | sed -n 's|^export AWS_ENDPOINT_URL=http://||p'; }

# --- commands ---

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

# --- check: as the clients use them ---

check_one() {
    case "$1" in
        object_store) (use_storage && timeout 120 "$BIN/python" "$HERE/services_check.py" storage s3://mshnet) ;;
        database) [[ "$(query mlflow 'select 1')" == 1 && "$(query mlflow_auth 'select 1')" == 1 ]] ;;
        tracker)
            (read_secrets && secret admin_password |
                timeout 120 "$BIN/python" "$HERE/services_check.py" tracker "http://$HOST:$TRACKER_PORT") || return
            [[ "$ARTIFACTS" != s3://* ]] ||
                (use_storage && timeout 120 "$BIN/python" "$HERE/services_check.py" storage "$ARTIFACTS")
            ;;
        monitoring) answers monitoring ;;
    esac
}

check() {
    read_settings
    local code=0 name found
    for name in $(in_order); do
        if found=$(check_one "$name" 2>&1); then
            printf '%-12s serves\n' "$name"
        else
            printf '%-12s does not serve: %s\n' "$name" "${found:-no answer}"
            code=3
        fi
    done
    return "$code"
}

# --- backup ---

# What both need; the arguments are services_backup.py's.
with_backups() {
    local own=()
    ! wanted object_store || own=(--own-store "$OBJECT_STORE/aws")
    export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
    "$BIN/python" "$HERE/services_backup.py" --postgres-bin "$(postgres_bin)" --socket "$SOCKET" \
        --artifacts "$ARTIFACTS" --scratch "$DIR" --kept "${SERVICES_BACKUPS_KEPT:-7}" "${own[@]}" "$@"
}

backup() {
    (($# >= 1)) || fail "say where to: $0 backup FOLDER or s3://BUCKET/PREFIX [s3://MORE/TO/SAVE ...]"
    read_settings
    take_lock
    answers database || fail "the database does not answer; run: $0 start"
    with_backups backup "$@"
}

restore() {
    (($# >= 1)) || fail "say where from: $0 restore FOLDER or s3://BUCKET/PREFIX [--replace]"
    claim_folder
    settle
    local name code=0
    for name in $(in_order); do
        [[ "$name" == tracker ]] || start_one "$name"
    done
    with_backups look "$@"
    stop_one tracker
    with_backups restore "$@" || code=$?
    start_all
    return "$code"
}

# --- systemd ---

control() {
    if [[ "$UNITS" == user ]]; then
        systemctl --user "$@"
    else
        systemctl "$@"
    fi
}

unit_folder() {
    if [[ "$UNITS" == user ]]; then
        echo "${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user"
    else
        echo /etc/systemd/system
    fi
}

units() {
    claim_folder
    settle
    if [[ "${1:-}" == remove ]]; then
        remove_units
        return
    fi
    [[ $# == 0 ]] || fail "no such argument '$1' (units, or units remove)"
    [[ "$DIR$HERE$SECRETS" =~ ^[A-Za-z0-9/._+-]+$ ]] ||
        fail "in the paths of units only letters, digits and / . _ + - can stand, got '$DIR', '$HERE', '$SECRETS'"
    local name wanted_by=multi-user.target
    for name in $(in_order | tac); do
        stop_one "$name" # systemd starts its own
    done
    UNITS=${SERVICES_UNITS:-$(is_root && echo system || echo user)}
    [[ "$UNITS" == user || "$UNITS" == system ]] || fail "SERVICES_UNITS must be user or system, got '$UNITS'"
    control show-environment >/dev/null 2>&1 || fail "systemd does not run here for this user; use: $0 start"
    [[ "$UNITS" == system ]] || wanted_by=default.target
    write_units "$wanted_by"
    control daemon-reload
    control enable --quiet mshnet.target
    write_settings
    if [[ "$UNITS" == user ]]; then
        loginctl enable-linger "$(id -un)" 2>/dev/null ||
            say "they end when you log out, until somebody runs: sudo loginctl enable-linger $(id -un)"
    fi
    start_all
    say "systemd keeps them running: systemctl ${UNITS/user/--user} status 'mshnet*'"
}

write_units() {
    local folder name services=''
    folder=$(unit_folder)
    for name in $(in_order); do
        services+="mshnet@$name.service "
    done
    (umask 022 && mkdir -p "$folder")
    for name in mshnet.target mshnet@.service mshnet-health.service mshnet-health.timer; do
        (umask 022 && sed -e "s|@SERVICES@ |$services|" -e "s|@WANTED_BY@|$1|" -e "s|@SCRIPT@|$HERE/services.sh|" \
            -e "s|@DIR@|$DIR|" -e "s|@SECRETS@|$SECRETS|" "$HERE/systemd/$name" >"$folder/$name")
    done
    mkdir -p "$folder/mshnet@tracker.service.d"
    printf '[Unit]\nAfter=mshnet@database.service mshnet@object_store.service\n' \
        >"$folder/mshnet@tracker.service.d/order.conf"
}

remove_units() {
    [[ -n "$UNITS" ]] || return 0
    local folder name
    folder=$(unit_folder)
    control disable --quiet mshnet.target
    control stop mshnet.target
    for name in $(in_order | tac); do
        stop_one "$name"
    done
    rm -rf "$folder"/mshnet{.target,@.service,@tracker.service.d,-health.service,-health.timer}
    control daemon-reload
    UNITS=''
    write_settings
    say "systemd has let go of them; they are stopped"
}

# heal: what does not serve, asked twice, is restarted. Nothing is done while somebody starts, stops or restores.
heal() {
    read_settings
    exec 9>"$DIR/lock"
    flock -n 9 || return 0
    local name found
    for name in $(in_order); do
        trim_log "$name"
        check_one "$name" >/dev/null 2>&1 && continue
        ! found=$(check_one "$name" 2>&1) || continue
        say "$(date -u +%FT%TZ) $name does not serve (${found:-no answer}); restarting it"
        stop_one "$name"
        (start_one "$name") || say "$name did not come back"
    done
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
