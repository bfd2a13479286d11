# shellcheck shell=bash
# Of infra/services.sh. Settings, kept in the folder; and the secrets.

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
