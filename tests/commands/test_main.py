import errno
import subprocess
import sys

import pytest

from lowbit_lightning import __main__ as command
from lowbit_lightning import __version__
from lowbit_lightning.errors import CorpusError


def test_light_verbs_do_not_import_torch() -> None:
    # A process of its own: in this one torch is imported already.
    code = """
import sys
from lowbit_lightning.__main__ import main
assert main(["list"]) == 0 and main(["--version"]) == 0 and main(["--help"]) == 0
assert main(["cp", "no_such_name", "x.yaml"]) == 2
assert not {"torch", "lightning", "jsonargparse"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowbit-lightning {__version__}\n"


def test_help_has_one_line_per_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for verb in ("fit", "validate", "test", "predict", "list", "cp", "export", "bench", "doctor"):
        assert sum(line[:1] == [verb] for line in lines) == 1


@pytest.mark.parametrize(("wrong", "right"), [("fti", "fit"), ("docter", "doctor"), ("lst", "list")])
def test_unknown_verb_offers_the_closest(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([wrong]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: unknown verb '{wrong}'. Did you mean {right}?")


def test_mendable_error_is_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, CorpusError("corpus 'x' is empty"))
    assert command.main(["list"]) == 2
    assert capsys.readouterr().err == "error: corpus 'x' is empty\n"


def test_full_disk_names_the_file_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/some/run/last.ckpt"))
    assert command.main(["list"]) == 2
    message = capsys.readouterr().err
    assert "/some/run/last.ckpt" in message
    assert "--trainer.default_root_dir" in message


def test_other_operating_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        command.main(["list"])


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, KeyboardInterrupt())
    assert command.main(["list"]) == 130


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(command, "_dispatch", fail)
