"""``lowbit-lightning list``: the shipped recipes and techniques, one line each."""

from lowbit_lightning import configs

HEADINGS = {
    "recipes": "Recipes: complete runs          lowbit-lightning fit --config NAME",
    "techniques": "Techniques: add to any run      lowbit-lightning fit --config RUN --config NAME",
}


def listing() -> str:
    """The aligned plain-text table that the command prints."""
    by_kind = {kind: configs.shipped(kind) for kind in configs.KINDS}
    width = max((len(name) for files in by_kind.values() for name in files), default=0)
    blocks = []
    for kind, files in by_kind.items():
        rows = [f"  {name:<{width}}  {configs.description(path)}".rstrip() for name, path in files.items()]
        blocks.append("\n".join([HEADINGS[kind], *(rows or ["  (none)"])]))
    return "\n\n".join([*blocks, "`lowbit-lightning cp NAME DEST` copies one to change it."])


def run() -> int:
    """Print the table."""
    print(listing())
    return 0
