"""The losses that ``tune`` has seen, on disk: what an interrupted search goes on from.

A step is a function of the start weights, the losses of the steps before it and nothing else, because all noise is a
function of the step. So losses are all that needs to be kept, a line of text for each step.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lowbit_lightning.errors import InvalidArgumentError

Entry = tuple[list[float], list[int]]


class Journal:
    """Losses of steps by key, each written down as soon as it is known.

    Args:
        path: the file, which may be there from an earlier search of the same configuration.
        configuration: all of it, as text.

    Raises:
        InvalidArgumentError: the file belongs to another configuration.
    """

    def __init__(self, path: Path, configuration: str) -> None:
        self._path = path
        self._entries: dict[str, Entry] = {}
        header = json.dumps({"configuration": hashlib.blake2s(configuration.encode(), digest_size=8).hexdigest()})
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and lines[0].strip() != header:
            raise InvalidArgumentError(
                f"tune: {str(path)!r} was left by a search with other settings: go on with those, remove the file, or "
                "give another --out"
            )
        whole = [line for line in lines[1:] if line.endswith("\n")]  # a kill may have torn the last one
        for line in whole:
            key, losses, params = json.loads(line)
            self._entries[key] = losses, params
        path.write_text("".join([f"{header}\n", *whole]))
        self._file = path.open("a")

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """Return the losses of a step and the positions of the parameters that took part in them."""
        return self._entries.get(key)

    def add(self, key: str, losses: Sequence[float], params: Sequence[int]) -> None:
        """Keep the losses of a step."""
        self._entries[key] = list(losses), list(params)
        self._file.write(json.dumps([key, *self._entries[key]]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file: the search is over."""
        self.close()
        self._path.unlink()
