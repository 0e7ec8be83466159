"""The swarm's directory on a DHT: signed, short-lived announcements."""

from swarm.dht.announcement import LEASE_S, RENEWAL_S, Announcement, State, precision_name
from swarm.dht.directory import Directory
from swarm.dht.expert_announcement import ExpertAnnouncement
from swarm.dht.model_listing import ModelListing
from swarm.dht.move_claims import MoveClaims

__all__ = [
    "LEASE_S",
    "RENEWAL_S",
    "Announcement",
    "Directory",
    "ExpertAnnouncement",
    "ModelListing",
    "MoveClaims",
    "State",
    "precision_name",
]
