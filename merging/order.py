"""One order for all names: by their UTF-8 bytes, never by time of registration."""


def by_bytes(name: str) -> bytes:
    """The sort key of a name: its UTF-8 bytes."""
    return name.encode("utf-8", "surrogatepass")
