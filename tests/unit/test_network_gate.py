"""The gate that keeps the library's reading thread from taking an answer that somebody waits for."""

from __future__ import annotations

import random
import threading
import time

from dints_deploy.dicom.network import Gate


class Reader(threading.Thread):
    """Does what an association's thread does: stands at the gate, then reads, again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gate = Gate(self)
        self.reading = self.stopping = False

    def run(self) -> None:
        rng = random.Random(0)
        while not self.stopping:
            self.gate.wait()
            self.reading = True
            time.sleep(rng.choice((0.0, 0.0002, 0.002)))
            self.reading = False


def test_the_reader_never_reads_while_the_gate_is_closed() -> None:
    rng = random.Random(1)
    reader = Reader()
    reader.start()
    for _ in range(300):
        reader.gate.clear()
        assert not reader.reading
        time.sleep(rng.choice((0.0, 0.0005)))
        assert not reader.reading
        reader.gate.set()
        time.sleep(rng.choice((0.0, 0.0, 0.001)))
    reader.stopping = True
    reader.join(5.0)
    assert not reader.is_alive()
    reader.gate.clear()  # nobody is there to be waited for
