# shellcheck shell=bash
# Of infra/services.sh. Saved, and brought back.

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
