"""The order of names everywhere: by their UTF-8 bytes, never by registration."""


def by_bytes(name: str) -> bytes:
    """The sort key of all names: their UTF-8 bytes."""
    return name.encode("utf-8", "surrogatepass")
