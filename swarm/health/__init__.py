"""The health dashboard: what a swarm looks like from outside, now and over the last month."""
