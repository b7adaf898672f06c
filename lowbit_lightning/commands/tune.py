"""``lowbit-lightning tune CONFIG``: find eps and lr of a forward-only run within a budget of forward passes.

This file reads and checks the command line, without importing torch; :mod:`.tune_search` says what is tried and in what
order, :mod:`.tune_passes` makes the passes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lowbit_lightning.errors import InvalidArgumentError


def run(arguments: Sequence[str]) -> int:
    """Run ``tune`` with the arguments after that word.

    Raises:
        LowBitError: A number out of range, a file that is there already, or a configuration that cannot be tuned.
    """
    options, settings = _parser().parse_known_args(arguments)
    out: Path = options.out
    if options.forwards < 1:
        raise InvalidArgumentError(f"tune: --forwards {options.forwards} is out of range: at least 1")
    if not out.absolute().parent.is_dir():
        raise InvalidArgumentError(f"tune: --out {str(out)!r}: the folder does not exist; create it first")
    if out.exists() and not options.force:
        raise InvalidArgumentError(
            f"tune: --out {str(out)!r} exists already; give another name, or --force to replace it"
        )
    from lowbit_lightning.commands import tune_passes

    configs = [argument for name in options.config for argument in ("--config", name)]
    return tune_passes.run(configs + settings, options.forwards, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbit-lightning tune",
        description="Find eps and lr of FZOO or MeZO. Six values of eps are compared at the start weights: sigma/eps "
        "is the norm of the gradient where it does not depend on eps. Eight learning rates then train from the start "
        "weights on the same batches, and the better half goes on, twice. Callbacks, loggers and the schedule of the "
        "run are left out, so the lr found is that of a constant schedule. Interrupt it with Ctrl-C; the same command "
        "goes on where it was.",
        epilog="Settings of the run may follow, as for fit: tune my.yaml --data.batch_size=4",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="what fit takes as --config, one after another")
    parser.add_argument("--forwards", type=int, default=2000, metavar="N", help="budget (default 2000)")
    parser.add_argument(
        "--out", type=Path, default=Path("tuned.yaml"), metavar="FILE", help="overlay to write (default tuned.yaml)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there already")
    return parser
