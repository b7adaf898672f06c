"""The ledger of a run: one line of JSON for every event, with what was done about it.

It is read again when the run resumes, because a checkpoint knows nothing of what happened after it: batches that were
left out the first time are left out again. Every line names its run, so several runs may share a file and a new run
in the same folder does not take over the batches of an earlier one.

A line is written at once and synced, since the process may not live long after an event. A full disk must not end a
run that is in trouble already: lines then wait in memory, with one warning, and are written when there is room again.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.events import SpikeEvent

Entry = dict[str, Any]


class Ledger:
    """Appends to and reads one JSON-lines file.

    Args:
        path: the file; made when it is not there.
        run: names the run in every line.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        self._waiting: list[str] = []  # lines that found no room on the disk

    def check_writable(self) -> None:
        """Make sure that lines can be appended.

        Raises:
            InvalidArgumentError: they cannot; the message names the file and the reason.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write("")
        except OSError as error:
            raise InvalidArgumentError(
                f"ledger={str(self.path)!r} cannot be written: {error.strerror}. Give a file in a folder that this"
                " process may write to"
            ) from error

    def append(
        self,
        event: SpikeEvent,
        decision: str,
        detail: str,
        left_out: tuple[int, int] | None = None,
        replayed: tuple[int, int] | None = None,
    ) -> None:
        """Write one line.

        Args:
            event: what happened.
            decision: what was done, one word.
            detail: the same for people.
            left_out: first and last batch, by their index in the run, that the weights owe nothing to because of it.
            replayed: first and last batch that are trained on once more because of it.
        """
        entry = event.as_json() | {
            "decision": decision,
            "detail": detail,
            "left_out": list(left_out) if left_out else None,
            "replayed": list(replayed) if replayed else None,
            "run": self.run,
        }
        self._waiting.append(json.dumps(entry, allow_nan=False) + "\n")
        try:
            self._write("".join(self._waiting))
            self._waiting.clear()
        except OSError as error:
            if len(self._waiting) == 1:  # the first that had to wait
                warnings.warn(
                    f"ledger {str(self.path)!r} cannot be written: {error.strerror}. Events are kept in memory until"
                    " there is room; training goes on.",
                    stacklevel=2,
                )

    def read(self) -> list[Entry]:
        """Return this run's lines, oldest first. A line torn by a kill is passed over."""
        if not self.path.exists():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and entry.get("run") == self.run:
                entries.append(entry)
        return entries

    def _write(self, text: str) -> None:
        # Unbuffered and in one call, so that a full disk is seen here and lines of two processes do not mix.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = text and size and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (("\n" if torn else "") + text).encode()
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, size)
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class LeftOut:
    """What a resumed run leaves out, because the run before it did.

    Args:
        entries: lines of a ledger.

    Attributes:
        batches: batches, by their index in the run, whose gradients were not applied.
        stretches: first and last batch of every stretch of data that a rollback left behind for good.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.batches: set[int] = set()
        self.stretches: list[tuple[int, int]] = []
        for entry in entries:
            if entry["replayed"]:  # each of them was judged anew
                first, last = entry["replayed"]
                self.batches -= set(range(first, last + 1))
            elif entry["left_out"]:
                first, last = entry["left_out"]
                if entry["decision"] == "rollback":
                    self.stretches.append((first, last))
                    self.batches -= set(range(first, last + 1))
                else:
                    self.batches.add(last)

    def upcoming(self, batch: int) -> int:
        """Return how many batches from ``batch`` on, the next one of the run, lie in stretches left behind."""
        end = batch
        while reached := [last for first, last in self.stretches if first <= end <= last]:
            end = max(reached) + 1
        return end - batch
