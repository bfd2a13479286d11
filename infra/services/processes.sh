# shellcheck shell=bash
# Of infra/services.sh. Processes: who runs, begun, ended, well or not.

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
