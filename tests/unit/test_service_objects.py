"""An object is there as long as a row counts on it, whoever comes and goes at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dints_deploy.service.objects import Objects, object_path
from dints_deploy.service.retention import orphans, purge
from tests.service import Bench


def test_arrivals_and_removals_at_one_time_leave_neither_an_orphan_nor_a_row_without_its_object(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    over = threading.Event()

    def bring(turn: int) -> None:
        for number in range(60):
            bench.take(number % 3, study=f"1.{turn % 2}")

    def remove() -> None:
        while not over.is_set():
            for (number,) in bench.rows("SELECT id FROM study"):
                if (study := bench.store.row("study", {"id": number})) is not None:
                    purge(bench.store, tmp_path, study, bench.intake.remove_objects)

    remover = threading.Thread(target=remove)
    remover.start()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(bring, range(6)))
    over.set()
    remover.join()
    assert list(orphans(bench.store, tmp_path)) == []


def test_what_is_on_its_way_is_not_removed_and_what_is_counted_is_what_is_there(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    objects = Objects(tmp_path, 0)
    received = bench.received(1, data=b"seven b")
    with objects.kept(received.sha256):
        objects.place(received.path, received.sha256)
        assert not objects.unwanted(received.sha256)
        objects.remove([received.sha256], lambda digest: False)
        assert object_path(tmp_path, received.sha256).read_bytes() == b"seven b"
        assert objects.held_bytes == 7
        again = bench.received(1, data=b"seven b")
        objects.place(again.path, again.sha256)
        assert objects.held_bytes == 7
    assert objects.unwanted(received.sha256)
    assert not objects.unwanted(received.sha256)
    objects.remove([received.sha256], lambda digest: True)
    assert object_path(tmp_path, received.sha256).exists()
    objects.remove([received.sha256], lambda digest: False)
    assert not object_path(tmp_path, received.sha256).exists()
    assert objects.held_bytes == 0
