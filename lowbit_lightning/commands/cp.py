"""``lowbit-lightning cp NAME DEST``: copy a shipped configuration to change it."""

from pathlib import Path

from lowbit_lightning import configs
from lowbit_lightning.atomic_file import atomic_file
from lowbit_lightning.errors import InvalidArgumentError


def run(name: str, dest: str, force: bool = False) -> int:
    """Copy the recipe or technique ``name``.

    Args:
        name: As shown by ``lowbit-lightning list``.
        dest: A file to write, or an existing folder, which then receives ``NAME.yaml``.
        force: Replace a file that is there already.

    Raises:
        InvalidArgumentError: Unknown name, a folder that does not exist, or a file that is there already.
    """
    source = configs.find(name)
    target = Path(dest)
    if target.is_dir() or dest.endswith(("/", "\\")):
        target = target / source.name
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"cp: the folder {str(target.parent)!r} does not exist; create it first.")
    if target.exists() and not force:
        raise InvalidArgumentError(f"cp: {str(target)!r} exists already; give another name, or --force to replace it.")
    with atomic_file(target) as file:
        file.write(source.read_bytes())
    # A technique is no run of its own.
    run_first = "" if source.stem in configs.shipped("recipes") else "--config RUN "
    print(f"{target}\nRun it with: lowbit-lightning fit {run_first}--config {target}")
    return 0
