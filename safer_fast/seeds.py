"""Seeds for keyed draws: every random number of a run is a function of (seed, what it is for), never of what ran before."""

import hashlib


def mix(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words, e.g. mix(seed, "order", epoch)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
