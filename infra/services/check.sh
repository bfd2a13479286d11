# shellcheck shell=bash
# Of infra/services.sh. Each service used as its clients do.

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
