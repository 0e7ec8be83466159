"""The gateway: a swarm behind the APIs that tools already speak, and a chat page."""
