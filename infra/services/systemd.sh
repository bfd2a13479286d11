# shellcheck shell=bash
# Of infra/services.sh. systemd keeps them running; what runs but does not serve is restarted.

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
