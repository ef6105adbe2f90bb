"""Read attributes out of a data set that may lie: a value of the right type and range, or a note that there is none."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from dints_deploy.dicom.bounded import INVALID_FILE


class Attributes:
    """A chain of data sets (a frame's functional groups, then the whole file), read without ever raising.

    Attributes:
        invalid: keywords that were there with a value that makes no sense.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self.invalid: list[str] = []

    def value(self, keyword: str) -> Any:
        """Return the first value that is there and not empty, or None."""
        tag = _tag(keyword)
        for dataset in self.datasets:
            if tag not in dataset.keys():  # noqa: SIM118 - a data set's own test is much slower
                continue
            try:
                element: Any = dataset[tag]
                value = element.value
            except INVALID_FILE:
                self.invalid.append(keyword)
                return None
            if value is not None and value != "":
                return value
        return None

    def text(self, keyword: str) -> str:
        """Return a value as one stripped line, empty where there is none."""
        value = self.value(keyword)
        return "" if value is None else " ".join(str(value).split())

    def first_text(self, *keywords: str) -> str:
        """Return the text of the first keyword that has one."""
        return next((text for text in map(self.text, keywords) if text), "")

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Return a multi-valued text, upper case."""
        value = self.value(keyword)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        return tuple(str(item).strip().upper() for item in _listed(values))

    def integer(self, keyword: str, *, low: int = 0, high: int = 2**32) -> int | None:
        """Return a whole number within [low, high], or None."""
        number = self.number(keyword)
        if number is None:
            return None
        if number != int(number) or not low <= number <= high:
            self.invalid.append(keyword)
            return None
        return int(number)

    def number(self, keyword: str) -> float | None:
        """Return one finite number, or None."""
        numbers = self.numbers(keyword, count=1)
        return None if numbers is None else numbers[0]

    def numbers(self, keyword: str, *, count: int) -> tuple[float, ...] | None:
        """Return `count` finite numbers, or None."""
        value = self.value(keyword)
        if value is None:
            return None
        try:
            numbers = tuple(float(item) for item in _listed(value))
        except INVALID_FILE:
            numbers = ()
        if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
            self.invalid.append(keyword)
            return None
        return numbers

    def items(self, keyword: str) -> tuple[Dataset, ...]:
        """Return the items of a sequence."""
        value = self.value(keyword)
        return tuple(item for item in _listed(value) if isinstance(item, Dataset)) if value is not None else ()


@functools.cache
def _tag(keyword: str) -> BaseTag:
    """Return the tag of a keyword of PS3.6."""
    return Tag(keyword)


def _listed(value: Any) -> Sequence[Any]:
    """Return a value of multiplicity one as a list of one."""
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
