# shellcheck shell=bash
# Of infra/services.sh. MLflow's server.

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
