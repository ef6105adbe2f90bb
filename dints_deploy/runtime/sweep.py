"""One sweep: the windows of a block cut, run, blended and restored, each in its turn and all at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dints_deploy.catalog.entry import Entry
from dints_deploy.runtime.blend import Logits, blend
from dints_deploy.runtime.blocks import Block
from dints_deploy.runtime.engine import Session
from dints_deploy.runtime.infer import Output, Voxels, cut, infer
from dints_deploy.runtime.memory import in_order
from dints_deploy.runtime.pipeline import Seconds, ahead, behind
from dints_deploy.runtime.preprocess import Lines, Prepared
from dints_deploy.runtime.restore import Decision, fill
from dints_deploy.runtime.window import Start


@dataclass(frozen=True, eq=False)
class Sweep:
    """What every block of a run shares.

    Attributes:
        swept: the prepared scan, the swept axis first.
        spec: the entry.
        along: the swept axis (0, 1, 2 for i, j, k): networks get their windows in the order i, j, k.
        sessions: one per member, opened for `batch` windows.
        batch: windows per call of a session.
        decide: logits to labels.
        seconds: where the times go; each stage counts the time that it was busy.
        ran: called after every window; told whether the engine ran it.
    """

    swept: Prepared
    spec: Entry
    along: int
    sessions: Sequence[Session]
    batch: int
    decide: Decision
    seconds: Seconds
    ran: Callable[[bool], None]

    def fill(self, labels: NDArray[Any], block: Block) -> None:
        """Fill a block of the label map; this thread runs the engine, one cuts ahead, one blends and restores behind.

        Args:
            labels: (I, J, K) of the whole scan on its reoriented grid, the swept axis first.
            block: to fill.
        """
        windows = ahead(self.seconds.each("cut", self._windows(block)))
        outputs = infer(
            self.sessions, windows, self.spec.outputs, self.spec.tta, batch=self.batch, seconds=self.seconds
        )

        def finish(outputs: Iterator[tuple[Start, Logits]]) -> None:
            window = in_order(self.spec.window, self.along)
            arriving = self.seconds.each("waiting", outputs)
            slabs = blend(arriving, self.swept.grid.shape, window, self.spec.overlap, block.columns)
            with self.seconds.stage("restore"):
                fill(labels[:, *block.voxels], self.seconds.each("blend", slabs), self._lines(block), self.decide)

        behind(finish, self._swept(outputs))

    def _windows(self, block: Block) -> Iterator[tuple[Start, Voxels]]:
        """Yield the windows with their axes in the order i, j, k."""
        for start, voxels in cut(self.swept, block.starts, in_order(self.spec.window, self.along)):
            yield start, np.moveaxis(voxels, 1, 1 + self.along)

    def _swept(self, outputs: Iterable[Output]) -> Iterator[tuple[Start, Logits]]:
        """Yield the logits with the swept axis first."""
        for output in outputs:
            yield output.start, np.moveaxis(output.logits, 1 + self.along, 1)
            self.ran(not output.again)

    def _lines(self, block: Block) -> Lines:
        """Return where the block's voxels lie between those of its columns."""
        i, j, k = self.swept.back
        (rows, _), (columns, _) = (
            line.within(part.start, part.stop - part.start) for line, part in zip((j, k), block.voxels, strict=True)
        )
        return i.shifted(self.swept.before[0]), rows, columns


def busy(seconds: Seconds) -> dict[str, float]:
    """Return the seconds by stage, where a stage that draws from another counts only its own."""
    own = dict(seconds.by_stage)
    waiting, blending = own.pop("waiting", 0.0), own.get("blend", 0.0)
    if "blend" in own:
        own["blend"] = blending - waiting
        own["restore"] -= blending
    return own
