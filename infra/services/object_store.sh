# shellcheck shell=bash
# Of infra/services.sh. The object store, by infra/object_store.sh.

object_store() {
    OBJECT_STORE_DIR=$OBJECT_STORE OBJECT_STORE_HOST=$HOST "$HERE/object_store.sh" "$@"
}

# Where S3 is: our own store by its profile, else wherever the usual environment leads.
use_storage() {
    if wanted object_store; then
        eval "$(object_store env)"
    else
        read_secrets
    fi
    export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
}

run_object_store() {
    # Three daemons that look after themselves; the one that ended is started again, the others go on.
    while (read_secrets && object_store start); do
        while object_store status >/dev/null; do sleep 5; done
    done
    fail "the object store does not start"
}
