#!/usr/bin/env bash
# A real S3 server on one machine: Ceph's RADOS gateway with one monitor and one disk daemon, all on 127.0.0.1, the
# gateway elsewhere only if it is told to.
#
#   infra/object_store.sh start     start it, the first time make it (half a minute); does nothing where it runs
#   infra/object_store.sh stop      stop it and wait for the end; the data stays
#   infra/object_store.sh restart   both
#   infra/object_store.sh status    what runs; exit code 0 if it serves, 3 if not
#   infra/object_store.sh env       lines to eval, after which every S3 client finds it: paths and address, no secret
#   infra/object_store.sh install   see to the system packages
#
# OBJECT_STORE_DIR   everything that belongs to it: data, credentials, logs (default: outputs/object_store)
# OBJECT_STORE_PORT  the port of S3 (default: the one it had, at first 7480)
# OBJECT_STORE_HOST  the address of this machine on which S3 listens (default: the one it had, at first 127.0.0.1)
# OBJECT_STORE_GIB   how much it may hold, fixed at the first start (default: 64, or what the disk has)
#
# AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY: the keys that the account gets at the first start (default: Ceph makes them)
#
# Each folder is a server of its own; several can run side by side. To be rid of one: stop it, remove its folder.
set -euo pipefail

PROGRAM=object_store
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=infra/packages.sh
source "$HERE/packages.sh"

PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
DIR=$(realpath -m "${OBJECT_STORE_DIR:-$HERE/../outputs/object_store}")
CONF=$DIR/ceph.conf
PYTHON=$HERE/../.venv/bin/python
BUCKET=mshnet
DAEMONS=(mon.a osd.0 client.rgw) # in the order of starting
declare -A BINARY=([mon.a]=ceph-mon [osd.0]=ceph-osd [client.rgw]=radosgw)

umask 077 # keys, credentials and data are the owner's alone

# Of this shell only: no daemon, and no client that the profile is meant for, shall find them in its environment.
GIVEN_KEYS=
[[ -z "${AWS_ACCESS_KEY_ID:-}" || -z "${AWS_SECRET_ACCESS_KEY:-}" || -n "${AWS_SESSION_TOKEN:-}" ]] ||
    GIVEN_KEYS=$AWS_ACCESS_KEY_ID$'\n'$AWS_SECRET_ACCESS_KEY
unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN

# --- settings: made at the first start and kept in the folder ---

# Nobody accepts connections there. (A look, not a claim: two first starts at once could choose the same.)
port_is_free() { ! (exec 3<>"/dev/tcp/${2:-127.0.0.1}/$1") 2>/dev/null; }

# Below the ports that the kernel gives to clients, so that no passing connection holds it at the next start.
free_port() {
    local port
    until port=$((20000 + RANDOM % 10000)) && port_is_free "$port"; do :; done
    echo "$port"
}

capacity_gib() {
    local free gib
    free=$(($(df --output=avail -B1 "$DIR" | tail -1) * 9 / 10 >> 30))
    ((free >= 1)) || fail "the disk of '$DIR' has less than 1 GiB to give; set OBJECT_STORE_DIR to a folder on another"
    gib=${OBJECT_STORE_GIB:-$((free < 64 ? free : 64))}
    [[ "$gib" =~ ^[1-9][0-9]*$ ]] || fail "OBJECT_STORE_GIB must be a whole number from 1, got '$gib'"
    ((gib <= free)) || fail "OBJECT_STORE_GIB is $gib, but the disk of '$DIR' has only $free GiB to give"
    echo "$gib"
}

new_uuid() { cat /proc/sys/kernel/random/uuid; }

read_settings() {
    FSID='' HOST=127.0.0.1 PORT='' MON_PORT='' OSD_UUID='' GIB=''
    # shellcheck source=/dev/null
    [[ ! -f "$DIR/settings" ]] || source "$DIR/settings"
}

# Takes the folder for this process, if it is ours to take.
claim_folder() {
    # Ceph's file of settings has its own idea of these.
    [[ "$DIR" != *[\;\#\"\'\$\\]* ]] || fail "OBJECT_STORE_DIR must have none of ; # \" ' \$ \\, got '$DIR'"
    # The lock is looked for last: another start may be about to make it, before anything else in there.
    if [[ -d "$DIR" && -n "$(ls -A "$DIR")" && ! -f "$DIR/lock" ]]; then
        fail "'$DIR' holds something else; set OBJECT_STORE_DIR to an empty or new folder"
    fi
    (umask 022 && mkdir -p "$(dirname "$DIR")") # what lies beside it is not ours to close
    mkdir -p "$DIR"
    chmod 700 "$DIR"
    take_lock
    mkdir -p "$DIR"/{log,run,rgw,aws}
}

take_lock() {
    exec 9>"$DIR/lock"
    flock -w 300 9 || fail "another start or stop in '$DIR' takes too long"
}

settle() {
    read_settings
    local wanted=${OBJECT_STORE_PORT:-${PORT:-7480}} host=${OBJECT_STORE_HOST:-$HOST}
    [[ "$wanted" =~ ^[1-9][0-9]{0,4}$ ]] || fail "OBJECT_STORE_PORT must be a port number, got '$wanted'"
    [[ "$host" =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ && "$host" != 0.0.0.0 ]] ||
        fail "OBJECT_STORE_HOST must be one IPv4 address of this machine, by which clients reach it, got '$host'"
    if runs client.rgw; then
        [[ "$wanted" == "$PORT" ]] || fail "it runs on port $PORT; to move it to $wanted, stop it first"
        [[ "$host" == "$HOST" ]] || fail "it runs on address $HOST; to move it to $host, stop it first"
    else
        port_is_free "$wanted" "$host" || fail "port $wanted is in use; choose another: OBJECT_STORE_PORT=... $0 start"
    fi
    runs mon.a || port_is_free "${MON_PORT:-0}" ||
        fail "port $MON_PORT, where its monitor has to listen, is in use; end the program that holds it"
    if [[ -z "$FSID" ]]; then
        dd if=/dev/zero of="$DIR/probe" bs=4096 count=1 oflag=direct status=none 2>/dev/null ||
            fail "the file system of '$DIR' has no direct writes (O_DIRECT); set OBJECT_STORE_DIR to a folder on a disk"
        rm "$DIR/probe"
        GIB=$(capacity_gib)
        FSID=$(new_uuid) OSD_UUID=$(new_uuid) MON_PORT=$(free_port)
    fi
    PORT=$wanted HOST=$host
    declare -p FSID OSD_UUID HOST PORT MON_PORT GIB | sed 's/^declare -- //' >"$DIR/settings.new"
    mv "$DIR/settings.new" "$DIR/settings"
}

write_ceph_conf() {
    cat >"$CONF" <<CONF
# Written at each start by infra/object_store.sh.
[global]
fsid = $FSID
mon host = [v2:127.0.0.1:$MON_PORT]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms bind msgr1 = false
ms mon client mode = crc
keyring = $DIR/keyring
run dir = $DIR/run
pid file = $DIR/run/\$name.pid
log file = $DIR/log/\$name.log
mon cluster log file = $DIR/log/cluster.log
crash dir = $DIR/log
# A socket's path may have 107 characters only; nothing here needs one.
admin socket =

# One copy on one disk: it survives a crash, not the loss of the disk.
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
auth allow insecure global id reclaim = false
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
# One monitor has nobody to wait for; with the usual second between changes the first start takes twice as long.
paxos propose interval = 0.05

mon data = $DIR/mon
# A nearly full disk is the owner's to judge: it is no reason to refuse to start.
mon data avail warn = 1
mon data avail crit = 0

osd data = $DIR/osd
bluestore block create = true
# The file is sparse: it takes what is stored. A quota on the account (below) ends before the file does, because a put
# over the quota is refused in words, where a full disk daemon stands still or ends.
bluestore block size = $((GIB * 5 / 4 + 8 << 30))
bluestore cache autotune = false
bluestore cache size = $((128 << 20))

# Logs that stay small.
debug mon = 0/0
debug paxos = 0/0
debug rocksdb = 0/0
debug bluestore = 0/0
debug bdev = 0/0
debug rgw = 0/0

[client.rgw]
rgw data = $DIR/rgw
rgw frontends = beast endpoint=$HOST:$PORT tcp_nodelay=1
rgw thread pool size = 64
# Requests in flight get so long at a stop; idle connections, which clients keep open, would take two minutes.
rgw exit timeout secs = 5
rgw enable ops log = false
rgw enable usage log = false
rgw dynamic resharding = false
# What is deleted gives its room back within minutes, and lifecycle rules are looked at all day, not at night only.
rgw gc obj min wait = 120
rgw gc processor period = 120
rgw lifecycle work time = 00:00-23:59
CONF
}

# --- daemons ---

pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null; }

# After SIGKILL the pid file stays and the number may be another program's, so the process is asked who it is.
runs() {
    local pid argv
    pid=$(pid_of "$1") || return 1
    mapfile -d '' -t argv 2>/dev/null <"/proc/$pid/cmdline" || return 1
    [[ "${argv[0]:-}" == *"${BINARY[$1]}" && " ${argv[*]} " == *" -c $CONF "* ]]
}

# daemon NAME COMMAND...: in a session of its own, so that it outlives the shell, and without our lock.
daemon() {
    local name=$1 log=$DIR/log/$1.log
    shift
    if [[ -f "$log" ]] && (($(stat -c %s "$log") > 16 << 20)); then
        mv "$log" "$log.1"
    fi
    exec setsid "$@" -c "$CONF" </dev/null >"$DIR/log/$name.start" 2>&1 9>&-
}

explain() {
    local name=${1%% *}
    say "$1; the end of its log:"
    tail -n 5 -q "$DIR/log/$name.start" "$DIR/log/$name.log" >&2 || true
    fail "more in $DIR/log"
}

# wait_until SECONDS COMMAND...: tried until it succeeds; fails when the time is over.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

ceph_says() { timeout 60 ceph -c "$CONF" "$@" >/dev/null 2>"$DIR/log/ceph.err" 9>&-; }

start_mon() {
    # The directory is whole once `ready` is in it; what was killed before is made again.
    if [[ ! -f "$DIR/mon/ready" ]]; then
        rm -rf "$DIR/mon" "$DIR/keyring"
        local key=(ceph-authtool "$DIR/keyring" --gen-key)
        ceph-authtool --create-keyring "$DIR/keyring" >/dev/null
        "${key[@]}" --name mon. --cap mon 'allow *' >/dev/null
        "${key[@]}" --name client.admin --cap mon 'allow *' --cap osd 'allow *' >/dev/null
        "${key[@]}" --name osd.0 --cap mon 'profile osd' --cap osd 'allow *' >/dev/null
        "${key[@]}" --name client.rgw --cap mon 'allow rw' --cap osd 'allow rwx' >/dev/null
        monmaptool --create --clobber --fsid "$FSID" --addv a "[v2:127.0.0.1:$MON_PORT]" "$DIR/monmap" >/dev/null
        mkdir "$DIR/mon"
        ceph-mon --mkfs -i a --monmap "$DIR/monmap" --keyring "$DIR/keyring" -c "$CONF" >"$DIR/log/mon.a.start" 2>&1 ||
            explain "mon.a could not be made"
        touch "$DIR/mon/ready"
    fi
    (daemon mon.a ceph-mon -i a) || explain "mon.a did not start"
}

start_osd() {
    if [[ ! -f "$DIR/osd/mkfs_done" ]]; then # Ceph's own mark
        rm -rf "$DIR/osd"
        mkdir "$DIR/osd"
        ceph_says osd new "$OSD_UUID" || explain "mon.a does not answer"
        ceph-osd -i 0 --mkfs --osd-uuid "$OSD_UUID" -c "$CONF" >"$DIR/log/osd.0.start" 2>&1 9>&- ||
            explain "osd.0 could not be made"
    fi
    (daemon osd.0 ceph-osd -i 0) || explain "osd.0 did not start"
}

# Mon and osd go into the background once they work. The gateway would go at once, so that nobody saw it fail.
start_gateway() {
    daemon client.rgw radosgw -f -n client.rgw &
    echo $! >"$DIR/run/client.rgw.pid"
    wait_until 120 answers_or_ended $! || explain "client.rgw does not answer"
    kill -0 $! 2>/dev/null || explain "client.rgw ended"
}

answers_or_ended() { answers || ! kill -0 "$1" 2>/dev/null; }

# It is S3 that answers, not whatever else may listen there.
answers() {
    (
        exec 3<>"/dev/tcp/$HOST/$PORT"
        printf 'GET / HTTP/1.0\r\n\r\n' >&3
        timeout 10 cat <&3 | grep -i '^x-amz-request-id:' >/dev/null
    ) 2>/dev/null
}

# --- the account: keys, their files in AWS's own formats, the bucket ---

write_aws_config() {
    cat >"$DIR/aws/config" <<CONFIG
[profile $BUCKET]
endpoint_url = http://$HOST:$PORT
region = us-east-1
request_checksum_calculation = when_required
response_checksum_validation = when_required
CONFIG
}

# Given keys take the place of those that Ceph made, in its own record of the account, which it reads from a pipe.
put_given_keys() {
    local record
    record=$("${admin[@]}" metadata get "user:$BUCKET")
    printf '%s\n' "$GIVEN_KEYS" "$record" | "$PYTHON" "$HERE/object_store_account.py" keys |
        "${admin[@]}" metadata put "user:$BUCKET" >/dev/null || fail "the given keys were not taken"
}

# Keys go from Ceph into the file through a pipe: no command line ever shows them.
make_account() {
    local admin=(timeout 120 radosgw-admin -c "$CONF")
    if [[ -f "$DIR/aws/ready" ]]; then
        # The gateway answers while the disk daemon below it is still starting, so something is read back.
        "${admin[@]}" user info --uid "$BUCKET" >/dev/null 2>&1 || explain "osd.0 does not answer"
        return
    fi
    if ! "${admin[@]}" user info --uid "$BUCKET" >/dev/null 2>&1; then
        "${admin[@]}" user create --uid "$BUCKET" --display-name "$BUCKET" >/dev/null
    fi
    "${admin[@]}" quota set --quota-scope user --uid "$BUCKET" --max-size "$((GIB << 30))" >/dev/null
    "${admin[@]}" quota enable --quota-scope user --uid "$BUCKET" >/dev/null
    [[ -z "$GIVEN_KEYS" ]] || put_given_keys
    "${admin[@]}" user info --uid "$BUCKET" |
        (eval "$(environment)" && "$PYTHON" "$HERE/object_store_account.py" bucket "$BUCKET") || fail "no bucket could be made"
    touch "$DIR/aws/ready"
}

environment() {
    # What is set already would win over the profile.
    echo "unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION AWS_ENDPOINT_URL_S3"
    printf 'export %s=%q\n' \
        AWS_CONFIG_FILE "$DIR/aws/config" \
        AWS_SHARED_CREDENTIALS_FILE "$DIR/aws/credentials" \
        AWS_PROFILE "$BUCKET" \
        AWS_DEFAULT_REGION us-east-1 \
        AWS_ENDPOINT_URL "http://$HOST:$PORT"
}

# --- commands ---

missing_packages() {
    local binary
    for binary in radosgw radosgw-admin ceph-mon ceph-osd ceph ceph-authtool monmaptool; do
        command -v "$binary" >/dev/null || return 0
    done
    return 1
}

install() {
    ! missing_packages || install_or_ask "an S3 server for this machine needs Ceph" "${PACKAGES[@]}"
}

start() {
    install
    [[ -x "$PYTHON" ]] || fail "no Python environment yet; run: make setup"
    claim_folder
    settle
    write_ceph_conf
    write_aws_config
    runs mon.a || start_mon
    runs osd.0 || start_osd
    runs client.rgw || start_gateway
    make_account
    say "S3 on http://$HOST:$PORT, bucket $BUCKET" \
        "to use it: eval \"\$(${OBJECT_STORE_DIR:+OBJECT_STORE_DIR=${DIR@Q} }$0 env)\""
}

stop() {
    [[ -f "$DIR/lock" ]] || return 0
    take_lock
    local i name
    not_running() { ! runs "$name"; }
    for ((i = ${#DAEMONS[@]} - 1; i >= 0; i--)); do
        name=${DAEMONS[i]}
        runs "$name" || continue
        kill "$(pid_of "$name")"
        wait_until 60 not_running || fail "$name (pid $(pid_of "$name")) does not end"
    done
}

status() {
    read_settings
    local code=0 name
    for name in "${DAEMONS[@]}"; do
        if runs "$name"; then
            printf '%-11s pid %s\n' "$name" "$(pid_of "$name")"
        else
            printf '%-11s stopped\n' "$name"
            code=3
        fi
    done
    if [[ -n "$PORT" ]] && answers; then
        printf '%-11s http://%s:%s\n' S3 "$HOST" "$PORT"
    else
        printf '%-11s no answer\n' S3
        code=3
    fi
    printf '%-11s %s\n' folder "$DIR"
    return "$code"
}

print_env() {
    read_settings
    [[ -n "$FSID" ]] || fail "no object store in '$DIR' yet; run: $0 start"
    environment
}

case "${1:-}" in
    start | stop | status | install) "$1" ;;
    restart)
        stop
        start
        ;;
    env) print_env ;;
    *) fail "no such command '${1:-}' (start, stop, restart, status, env, install)" ;;
esac
