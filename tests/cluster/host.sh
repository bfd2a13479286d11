#!/usr/bin/env bash
# First process of a host (tests/cluster/hosts.py starts it in namespaces of its own): own files, own name, sshd.
#
#   host.sh NAME ADDRESS FOLDER CHECKOUT INTERPRETER
#
# FOLDER      this host's disk: its /root, /tmp, /run, /etc/ssh and /var/lib/mshnet
# CHECKOUT    hidden, but for its environment, which also lies at ~/mshnet/.venv: what an image of the host would hold
# INTERPRETER the folder of the environment's Python
set -euo pipefail

NAME=$1 ADDRESS=$2 FOLDER=$3 CHECKOUT=$4 INTERPRETER=$5
ENVIRONMENT=mshnet/.venv # below the home folder, where the cluster file has it

mount --make-rprivate /
hostname "$NAME"
mkdir -p "$FOLDER"/{root/"$ENVIRONMENT",tmp,run/sshd,etc,var} /var/lib/mshnet
chmod 700 "$FOLDER/root"
chmod 1777 "$FOLDER/tmp"

# Both may lie below a folder that is about to be covered.
hold=$FOLDER/run
mkdir -p "$hold"/{venv,python}
mount --rbind "$CHECKOUT/.venv" "$hold/venv"
mount --bind "$INTERPRETER" "$hold/python"

readonly_bind() {
    mkdir -p "$2"
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
}

printf '127.0.0.1 localhost\n%s %s\n' "$ADDRESS" "$NAME" >"$FOLDER/etc/hosts"
mount --bind "$FOLDER/etc/hosts" /etc/hosts
mount --bind "$FOLDER/etc/ssh" /etc/ssh
mount --bind "$FOLDER/var" /var/lib/mshnet # infra/services.sh, as root
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --rbind "$FOLDER/run" /run # the held folders come along
home=~root # of whom the operator logs in as
mount --bind "$FOLDER/root" "$home"
mount -t tmpfs -o size=1m tmpfs "$CHECKOUT"
mount --bind "$FOLDER/tmp" /tmp
readonly_bind /run/python "$INTERPRETER"
readonly_bind /run/venv "$CHECKOUT/.venv" # the environment's scripts name their interpreter by this path
readonly_bind /run/venv "$home/$ENVIRONMENT"

/usr/sbin/sshd -D -e </dev/null >"$home/sshd.log" 2>&1 &
trap 'exit 0' TERM
while :; do wait -n 2>/dev/null || sleep 1; done # reaps what has lost its parent
