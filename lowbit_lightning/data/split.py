"""Which part a document belongs to: a function of its own name or content, so adding a file moves no other one."""

import hashlib


def is_validation(key: bytes, val_fraction: float) -> bool:
    """Whether the document with this key is held out. Independent of seed, order, platform and Python's own hash.

    Args:
        key: The document's relative path or its content.
        val_fraction: Expected share of documents held out, in (0, 1).
    """
    digest = hashlib.blake2b(key, digest_size=8, person=b"lowbit split").digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64
