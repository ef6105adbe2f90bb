"""Commands of the workshop need the `search` extra; where it is missing they say how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dints_deploy.errors import UsageError


@contextmanager
def needs_search_extra(command: str) -> Iterator[None]:
    """Turn the ImportError of an import inside the block into the line that mends it."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            "extra-missing", f"`{command}` needs torch and MONAI ({error}): pip install 'dints-deploy[search]'"
        ) from error
