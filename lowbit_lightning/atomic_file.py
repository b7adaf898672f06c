"""Write a file so that it is there whole or not at all: beside the target under another name, then renamed over it.

Lightning's own ``_atomic_save`` writes into the system's temporary folder and *moves* the result. Where that folder is
another file system (``/tmp`` in memory, the run on a disk) the move is a copy, and a full disk or a kill in its middle
leaves a torn file under the final name. A name in the same folder makes the last act a rename, which cannot tear.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing; it appears, or is replaced, only when the block ends without an error.

    Args:
        path: The file to write. Its folder must exist.

    Raises:
        OSError: Whatever went wrong while writing, with ``filename`` set to ``path``; the target is untouched and no
            partial file stays.
    """
    # One fixed name: what a kill leaves behind is overwritten by the next attempt instead of piling up.
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may keep the rename and lose the bytes
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
