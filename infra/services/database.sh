# shellcheck shell=bash
# Of infra/services.sh. PostgreSQL.

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
