"""The memory that is left is the least that the machine, the process's control group or one above it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from dints_deploy.runtime.rss import available_bytes


def group(folder: Path, limit: str, current: int, inactive_file: int = 0) -> None:
    """Write a control group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive_file}\n")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"a/b": "10000"}, 6500),
        ({"a": "10000"}, 6500),
        ({"": "10000"}, 6500),
        ({"a/b": "10000", "a": "9000"}, 5500),
        ({"a/b": "9000", "a": "max", "": "10000"}, 5500),
        ({"a/other": "5000", "": "10000"}, 6500),
    ],
)
def test_the_narrowest_group_above_the_process_counts(limits: dict[str, str], left: int, tmp_path: Path) -> None:
    for path, limit in limits.items():
        group(tmp_path / "groups" / path, limit, current=4000, inactive_file=500)
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    assert available_bytes(membership, tmp_path / "groups") == left


@pytest.mark.parametrize("said", ["0::/\n", "0::/../outside\n", "1:memory:/old\n", ""])
def test_without_a_limit_it_is_the_machine_s(said: str, tmp_path: Path) -> None:
    group(tmp_path / "groups", "max", current=4000)
    group(tmp_path / "outside", "10000", current=4000)
    membership = tmp_path / "cgroup"
    membership.write_text(said)
    assert available_bytes(membership, tmp_path / "groups") > 1 << 20


def test_a_process_without_groups_has_the_machine_s_memory(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "absent", tmp_path / "nowhere") > 1 << 20
