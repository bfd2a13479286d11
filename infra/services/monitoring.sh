# shellcheck shell=bash
# Of infra/services.sh. Prometheus.

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
