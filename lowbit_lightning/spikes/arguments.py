"""How arguments out of range are refused, in the same words everywhere."""

from lowbit_lightning.errors import InvalidArgumentError


def check(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Refuse an argument outside its range.

    Raises:
        InvalidArgumentError: ``condition`` is false; the message names the argument, its value and what is allowed.
    """
    if not condition:
        raise InvalidArgumentError(f"{argument}={value!r} is out of range: {allowed}")
