#!/bin/sh
# Runs a program of Swarm in a container; peers of one compose file find each other through a shared file.
#
#   SWARM_ADDRESS        this peer's address without its id, e.g. /dns4/bootstrap/tcp/31337. With the id that follows
#                        from $SWARM_IDENTITY it is written to $SWARM_PEERS_FILE, and told to other peers.
#   SWARM_PEERS_FILE     without SWARM_ADDRESS: wait for this file and join through the address in it.
#
# Without these variables it runs its arguments as they are.
set -eu

if [ -n "${SWARM_ADDRESS:-}" ]; then
    peer_id=$(python -c '
import pathlib, sys
from swarm.transport.identity import Identity
print(Identity.load_or_create(pathlib.Path(sys.argv[1])).peer_id)' "$SWARM_IDENTITY")
    # Readers see the whole address or none.
    echo "$SWARM_ADDRESS/p2p/$peer_id" > "$SWARM_PEERS_FILE.new"
    mv "$SWARM_PEERS_FILE.new" "$SWARM_PEERS_FILE"
    set -- "$@" --identity "$SWARM_IDENTITY" --announce "$SWARM_ADDRESS"
elif [ -n "${SWARM_PEERS_FILE:-}" ]; then
    until [ -s "$SWARM_PEERS_FILE" ]; do
        sleep 0.2
    done
    set -- "$@" --initial-peers "$(cat "$SWARM_PEERS_FILE")"
fi
exec "$@"
