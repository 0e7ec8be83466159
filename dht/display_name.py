"""What people call a server: a stranger's text, fit to be shown anywhere."""

from __future__ import annotations

from swarm.dht.announcement import Announcement
from swarm.dht.expert_announcement import ExpertAnnouncement


def name_of(server: Announcement | ExpertAnnouncement) -> str:
    """Its public name, or the ends of its peer id."""
    return shown_name(server.public_name) or short_id(server.peer_id)


def short_id(peer_id: str) -> str:
    """The ends of a peer id."""
    return f"{peer_id[:8]}…{peer_id[-4:]}"


def shown_name(name: str) -> str:
    """A stranger's text in one line, without what could play with its surroundings."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
