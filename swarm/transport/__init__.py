"""The libp2p node: identity, the p2pd daemon, raw streams, limits and heartbeats."""
