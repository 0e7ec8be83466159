"""A badge for READMEs: the model's name and how it is, as SVG. Pure."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from swarm.health.verdicts import Health

_COLOURS = {Health.HEALTHY: "#1a7f4b", Health.DEGRADED: "#8a5a00", Health.BROKEN: "#b3261e"}
_UNKNOWN_COLOUR = "#59636e"
_NARROW, _WIDE = set("fijlrt.,:;|!'()[]-"), set("mwMW@%")
_PADDING = 7
_MAX_CHARACTERS = 48


def badge_svg(name: str, health: Health | None) -> str:
    """Two fields beside each other; None: nobody knows the model."""
    name = name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 1]}…"
    status = health.value if health is not None else "unknown"
    colour = _COLOURS[health] if health is not None else _UNKNOWN_COLOUR
    left, right = _width(name) + 2 * _PADDING, _width(status) + 2 * _PADDING
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f"aria-label={quoteattr(f'{name}: {status}')}><title>{escape(f'{name}: {status}')}</title>"
        f'<clipPath id="r"><rect width="{left + right}" height="20" rx="3"/></clipPath><g clip-path="url(#r)">'
        f'<rect width="{left}" height="20" fill="#2f363d"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2:g}" y="14" textLength="{left - 2 * _PADDING}">{escape(name)}</text>'
        f'<text x="{left + right / 2:g}" y="14" textLength="{right - 2 * _PADDING}">{status}</text></g></svg>'
    )


def _width(text: str) -> int:
    """About how many pixels it takes."""
    return round(sum(4.4 if letter in _NARROW else 10.0 if letter in _WIDE else 7.0 for letter in text))
