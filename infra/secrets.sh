#!/usr/bin/env bash
# Make the cluster's secrets on the operator's machine, once. What is there already is kept; nothing is printed.
#
#   infra/secrets.sh                      Ray's token and the tracker's password
#   infra/secrets.sh --own-object-store   the keys of the cluster's own object store too (infra/on_premise.yaml)
#
# ~/.ray/auth_token        Ray's token: whoever has it may run code on the cluster
# ~/.mshnet/cluster.env    KEY=VALUE lines, the environment of every node (MSHNET_SECRETS=FILE: another place)
#
# `ray up` brings both files to the nodes. A new secret: remove its line (or the token's file), run this again, `ray up`.
set -euo pipefail

PROGRAM=secrets
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=infra/packages.sh
source "$HERE/packages.sh"

RAY=$HERE/../.venv/bin/ray
TOKEN=$HOME/.ray/auth_token
ENV_FILE=${MSHNET_SECRETS:-$HOME/.mshnet/cluster.env}

umask 077 # the owner's alone

# 32 bytes of the kernel's, letters and digits only: they need no quoting anywhere.
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# keep_or_add KEY VALUE
keep_or_add() { grep -q "^$1=" "$ENV_FILE" || printf '%s=%s\n' "$1" "$2" >>"$ENV_FILE"; }

make_token() {
    if [[ ! -s "$TOKEN" ]]; then
        [[ -x "$RAY" ]] || fail "no Python environment yet; run: make setup"
        "$RAY" get-auth-token --generate >/dev/null 2>&1 || fail "ray get-auth-token --generate failed; run it to see why"
    fi
    # Ray makes it readable for everybody.
    chmod 700 "$(dirname "$TOKEN")"
    chmod 600 "$TOKEN"
}

make_env_file() {
    local folder
    folder=$(dirname "$ENV_FILE")
    [[ -d "$folder" ]] || mkdir -p "$folder"
    touch "$ENV_FILE"
    chmod 600 "$ENV_FILE"
    keep_or_add MLFLOW_TRACKING_USERNAME mshnet
    keep_or_add MLFLOW_TRACKING_PASSWORD "$(random)"
    [[ -z "$1" ]] || {
        keep_or_add MSHNET_OWN_OBJECT_STORE 1
        keep_or_add AWS_ACCESS_KEY_ID "$(random | head -c 20)"
        keep_or_add AWS_SECRET_ACCESS_KEY "$(random)"
    }
}

case "${1:-}" in
    '' | --own-object-store) ;;
    *) fail "no such option '$1' (--own-object-store or none)" ;;
esac
make_token
make_env_file "${1:-}"
say "Ray's token in $TOKEN, the nodes' environment in $ENV_FILE"
