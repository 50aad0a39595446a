"""Times in words."""


def duration(seconds: float) -> str:
    """Two digits, in the largest unit of which there are one and a half."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {seconds:.2g} seconds"
