"""The user's own shell command for an event: a page, a mail. Training never waits for it."""

import json
import os
import subprocess
import warnings

from lowbit_lightning.spikes.events import SpikeEvent


class AlertCommand:
    """Runs a shell command for an event, beside the training, and warns if it fails.

    The command finds the event in its environment: ``SPIKE_MESSAGE`` is one line for people, ``SPIKE_EVENT`` the event
    as JSON with the keys ``decision`` and ``detail`` added.

    Args:
        command: as the shell takes it; None runs nothing.
    """

    def __init__(self, command: str | None) -> None:
        self.command = command
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, event: SpikeEvent, decision: str, detail: str) -> None:
        """Start the command. One that cannot be started is warned of."""
        if self.command is None:
            return
        plain = event.as_json() | {"decision": decision, "detail": detail}
        variables = {"SPIKE_MESSAGE": event.message(), "SPIKE_EVENT": json.dumps(plain, allow_nan=False)}
        try:
            # A session of its own: interrupting the training must not interrupt the alert.
            process = subprocess.Popen(
                self.command,
                shell=True,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        except OSError as error:
            warnings.warn(f"on_alert: {self.command!r} could not be started: {error}", stacklevel=2)
        else:
            self._running.append(process)

    def poll(self) -> None:
        """Warn of commands that have failed since the last look."""
        for process in list(self._running):
            if (status := process.poll()) is not None:
                self._running.remove(process)
                if status:
                    warnings.warn(f"on_alert: {self.command!r} failed with status {status}", stacklevel=2)

    def finish(self, seconds: float = 10.0) -> None:
        """Give the commands that still run a last moment at the end of training; what takes longer is left running."""
        for process in self._running:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.returncode = 0  # it goes on without us; Popen would warn of it when collected
        self.poll()
