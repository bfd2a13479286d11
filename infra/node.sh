#!/usr/bin/env bash
# A node of the cluster. The start commands of ray_cluster.yaml and infra/on_premise.yaml call it on each one.
#
#   infra/node.sh head [FLAGS]     the services (infra/services.sh), then Ray's head; FLAGS are `ray start`'s
#   infra/node.sh worker [FLAGS]   a worker of the head that RAY_HEAD_IP names
#   infra/node.sh stop             end what this node runs; on the head of infra/on_premise.yaml, on all nodes
#   infra/node.sh login            for shells on this node: `ray` is found, and asks with the token
#
# It reads the secrets of infra/secrets.sh, which came by file_mounts (MSHNET_SECRETS: their file). Everything that Ray
# starts inherits the environment made here: the job's driver and its workers need nothing more.
# Each port is fixed; docs/cluster.md lists them, and a test compares.
set -euo pipefail

PROGRAM=node
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=infra/packages.sh
source "$HERE/packages.sh"

BIN=$(dirname "$HERE")/.venv/bin
ENV_FILE=${MSHNET_SECRETS:-$HOME/.mshnet/cluster.env}
BOOTSTRAP=$HOME/ray_bootstrap_config.yaml # `ray up` puts it on the head
PORTS=(
    --object-manager-port=8076
    --node-manager-port=8077
    --metrics-export-port=8078
    --runtime-env-agent-port=8079
    --dashboard-agent-grpc-port=8080
    --dashboard-agent-listen-port=8081
    --min-worker-port=10100
    --max-worker-port=10999
)
# Results are small JSON; pixels never pass through Ray's object store.
SIZE=(--object-store-memory=300000000)

read_secrets() {
    [[ -f "$ENV_FILE" ]] || fail "no '$ENV_FILE'; run infra/secrets.sh on the operator's machine, then ray up"
    [[ -s "$HOME/.ray/auth_token" ]] || fail "no '$HOME/.ray/auth_token'; run infra/secrets.sh, then ray up"
    [[ -x "$BIN/ray" ]] || fail "no Python environment here; run: make -C $(dirname "$HERE") setup"
    chmod 600 "$ENV_FILE" "$HOME/.ray/auth_token"
    chmod 700 "$(dirname "$ENV_FILE")" "$HOME/.ray"
    # `ray up` sets it to 1 for whatever it runs. Inherited, it would hold every training to one thread.
    unset OMP_NUM_THREADS PYTHONWARNINGS
    set -a
    # shellcheck source=/dev/null
    source "$ENV_FILE"
    set +a
}

# The head as the workers see it: as the operator's file names it, else the address by which this machine goes out.
head_address() {
    "$BIN/python" - "$BOOTSTRAP" <<'PYTHON'
import os, socket, sys, yaml

config = yaml.safe_load(open(sys.argv[1])) if os.path.exists(sys.argv[1]) else {}
if named := config.get("provider", {}).get("head_ip"):
    print(socket.gethostbyname(named))
else:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
        print(probe.getsockname()[0])
PYTHON
}

export_environment() {
    export PATH="$BIN:$PATH"
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    export RAY_JOB_STOP_WAIT_TIME_S=30 # so long has a stopped job to end in order; Ray's 3 s are few for a busy tracker
    export MLFLOW_TRACKING_URI="http://$HEAD:5000" MLFLOW_DISABLE_TELEMETRY=true
    # Ceph, MinIO and others answer 411 to the newer SDKs' way of checksums.
    export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
    if [[ -n "${MSHNET_OWN_OBJECT_STORE:-}" ]]; then
        export AWS_ENDPOINT_URL="http://$HEAD:7480" AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
    fi
    # A node serves many connections; what a login gives (1024) is too few.
    ulimit -n "$(ulimit -Hn)" || true
    umask 077 # logs are the owner's alone
}

start_services() {
    local which="database tracker monitoring"
    [[ -z "${MSHNET_OWN_OBJECT_STORE:-}" ]] || which="object_store $which"
    SERVICES=${SERVICES:-$which} SERVICES_DIR=${SERVICES_DIR:-$HOME/.mshnet/services} SERVICES_HOST=$HEAD \
        "$HERE/services.sh" start
}

start_head() {
    read_secrets
    HEAD=$(head_address)
    export_environment
    start_services
    # The dashboard and its job API are for tunnels only. No CPUs: the head is for the services and the drivers.
    ray start --head --port=6379 --node-ip-address="$HEAD" --dashboard-host=127.0.0.1 --dashboard-port=8265 \
        --ray-client-server-port=10001 --num-cpus=0 --autoscaling-config="$BOOTSTRAP" \
        "${PORTS[@]}" "${SIZE[@]}" "$@"
}

start_worker() {
    [[ -n "${RAY_HEAD_IP:-}" ]] || fail "RAY_HEAD_IP must be the head's address; ray up sets it"
    HEAD=$RAY_HEAD_IP
    read_secrets
    export_environment
    # The autoscaler never again touches a node whose start command failed, but a node that it does not hear from it
    # starts anew every half minute. So a head that is out of reach for a moment is told, not returned.
    ray start --address="$HEAD:6379" "${PORTS[@]}" "${SIZE[@]}" "$@" ||
        say "Ray did not start here (exit code $?); the head tries again"
}

# Ray's own `ray down` ends Ray on the head only; what it started elsewhere it leaves to time out, and a part of it does
# not. Once the head has stopped, nothing starts a worker again.
stop() {
    "$BIN/ray" stop
    local worker
    for worker in $(workers); do
        ssh -i ~/ray_bootstrap_key.pem -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
            -o ConnectTimeout=10 "$worker" "$BIN/ray stop" </dev/null || say "$worker could not be reached"
    done
    export SERVICES_DIR=${SERVICES_DIR:-$HOME/.mshnet/services}
    [[ ! -d "$SERVICES_DIR" ]] || "$HERE/services.sh" stop
}

# USER@ADDRESS of each, on the head of infra/on_premise.yaml; elsewhere none.
workers() {
    [[ -f "$BOOTSTRAP" ]] || return 0
    "$BIN/python" -c 'import sys, yaml
config = yaml.safe_load(open(sys.argv[1]))
print(*(config["auth"]["ssh_user"] + "@" + ip for ip in config["provider"].get("worker_ips", [])))' "$BOOTSTRAP"
}

login() {
    local line
    for line in "export PATH=$BIN:\$PATH" "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"; do
        grep -qsxF "$line" ~/.bashrc || echo "$line" >>~/.bashrc
    done
}

command=${1:-}
case "$command" in
    head | worker)
        shift
        "start_$command" "$@"
        ;;
    stop | login) "$command" ;;
    *) fail "no such command '$command' (head, worker, stop, login)" ;;
esac
