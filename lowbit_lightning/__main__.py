"""The ``lowbit-lightning`` command, also ``python -m lowbit_lightning``.

The verbs that only look at files answer without importing torch, which takes seconds; ``fit``, ``validate``, ``test``
and ``predict`` are handed to :class:`lowbit_lightning.cli.LowBitCLI`. An error that the user can mend is one message on
stderr and status 2, never a traceback; a run that diverged for good ends with status 3.
"""

import argparse
import difflib
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lowbit_lightning import __version__
from lowbit_lightning.errors import InvalidArgumentError, LowBitError, TrainingDivergedError

VERBS = {
    "fit": "train a model: `fit --config quickstart`, `fit --config my.yaml --config solo`, `fit --help`",
    "validate": "run the validation loop of a configuration, with --ckpt_path on a checkpoint",
    "test": "run the test loop of a configuration",
    "predict": "run the predict loop of a configuration",
    "list": "show the shipped recipes and techniques",
    "cp": "copy a shipped recipe or technique to change it: `cp NAME DEST [--force]`",
    "export": "turn quantized optimizer states back into torch AdamW's: `export CHECKPOINT [-o OUT]`",
    "tune": "find eps and lr of a forward-only run: `tune CONFIG --forwards 2000` writes tuned.yaml",
    "doctor": "describe this machine and what will work on it; --digest compares the kernels' results",
    "bench": "measure on this machine: `bench optim` (steps against torch, torchao, bitsandbytes), guard, zo",
}
LIGHTNING_VERBS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """The text of ``--help``."""
    rows = [f"  {verb:<10}{line}" for verb, line in VERBS.items()]
    return "\n".join(
        [
            "usage: lowbit-lightning VERB ...",
            "",
            "Low-memory and low-precision training for any LightningModule, from YAML alone.",
            "",
            *rows,
            "",
            "  --version",
            "  --help",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one command line.

    Args:
        argv: The arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0, 2 for an error that the user can mend, 3 for a run that diverged, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except TrainingDivergedError as error:
        _complain(str(error))
        return 3
    except LowBitError as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _complain(_disk_full(error))
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # Lightning shuts down in order after Ctrl-C and then exits with 1, as if training had failed.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        raise


def _dispatch(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        print(f"lowbit-lightning {__version__}")
        return 0
    # LightningCLI takes a --config before its verb too.
    if verb in LIGHTNING_VERBS or verb in ("-c", "--config") or verb.startswith(("-c=", "--config=")):
        from lowbit_lightning.cli import run

        return run(arguments)
    if verb not in VERBS:
        closest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        guess = f" Did you mean {closest[0]}?" if closest else ""
        raise InvalidArgumentError(f"unknown verb {verb!r}.{guess} `lowbit-lightning --help` lists the verbs.")
    if verb == "bench":  # has verbs of its own
        from lowbit_lightning.commands import bench

        return bench.run(rest)
    if verb == "tune":  # takes settings of the run as well
        from lowbit_lightning.commands import tune

        return tune.run(rest)
    parser = argparse.ArgumentParser(prog=f"lowbit-lightning {verb}", description=VERBS[verb], allow_abbrev=False)
    if verb == "cp":
        parser.add_argument("name", help="as shown by `lowbit-lightning list`")
        parser.add_argument("dest", help="a file to write, or an existing folder")
        parser.add_argument("--force", action="store_true", help="replace a file that is there already")
    if verb == "export":
        parser.add_argument("checkpoint", help="a checkpoint file of a Lightning run")
        parser.add_argument("-o", "--out", help="a file to write, or an existing folder; by default NAME-adamw.ckpt")
        parser.add_argument("--force", action="store_true", help="replace a file that is there already")
        parser.add_argument("--trust", action="store_true", help="load a checkpoint that could run code")
    if verb == "doctor":
        parser.add_argument("--digest", action="store_true", help="compare the kernels' results with committed ones")
    options = parser.parse_args(rest)
    if verb == "list":
        from lowbit_lightning.commands import list as list_command

        return list_command.run()
    if verb == "cp":
        from lowbit_lightning.commands import cp

        return cp.run(options.name, options.dest, options.force)
    if verb == "export":
        from lowbit_lightning.commands import export

        return export.run(options.checkpoint, options.out, options.force, options.trust)
    from lowbit_lightning.commands import doctor

    return doctor.run(digest=options.digest)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _disk_full(error: OSError) -> str:
    """What to say when the disk is full: which file, how much is left there, what to do."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    folder = next((str(parent) for parent in path.absolute().parents if parent.is_dir()), ".") if path else "."
    free = shutil.disk_usage(folder).free / 2**20
    what = f" while writing {str(path)!r}" if path else ""
    return (
        f"no space left on the disk{what}: {free:,.0f} MiB free in {folder!r}. Nothing half-written was kept."
        " Free some space (old checkpoints are the usual place), or write elsewhere: the logger's save_dir"
        " (--trainer.logger.init_args.save_dir), or without one --trainer.default_root_dir, decides where."
    )


if __name__ == "__main__":
    sys.exit(main())
