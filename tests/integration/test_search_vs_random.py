"""The comparison of search with chance, on a tiny task: it goes to the end, skips what is done, refuses a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from benchmarks.arms import TOLERANCE, read_record
from benchmarks.results import page, read_records
from benchmarks.search_vs_random import main
from dints_search.gap import INHERITED, RETRAINED, SEARCH_NETWORK
from dints_search.run import read_config
from tests.tiny_task import tiny_search_recipe, write_task


def arguments(folder: Path, *, retrain_steps: int = 30) -> list[str]:
    places = ["--data", folder / "task", "--out", folder / "runs", "--records", folder / "records"]
    arms = ["--task", folder / "tiny.toml", "--sigmas", 0.5, "--random", 1, "--threads", 1]
    steps = ["--search-steps", 4, "--retrain-steps", retrain_steps, "--width", 0.125]
    return [str(word) for word in (*places, *arms, *steps)]


def test_arms_are_measured_once_and_only_under_one_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path / "task")
    recipe = tiny_search_recipe(tmp_path).model_dump(mode="json", exclude_none=True)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    main(arguments(tmp_path))
    searched, drawn = records = read_records(tmp_path / "records")

    assert [r.kind for r in records] == ["searched", "random"]
    assert abs(drawn.cost["gmac"] / searched.cost["gmac"] - 1) <= TOLERANCE
    assert searched.settings["retraining"] == drawn.settings["retraining"]
    assert searched.gap is not None
    assert {row.stage for row in searched.gap.rows} == {SEARCH_NETWORK, INHERITED, RETRAINED}
    for record in records:  # one case is held out for the gap, two are the validation part
        trained = set(read_config(tmp_path / "runs" / record.arm / "retrained").cases)
        assert len(trained) == 7
        assert not trained & ({*searched.gap.cases} | {*record.scores["cases"]})
    assert "| random-0-seed-0 |" in page(records)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("re*/*.json")}
    (tmp_path / "records" / "random-0-seed-0.json").unlink()  # its run is finished: only the measuring is done again
    capsys.readouterr()
    main(arguments(tmp_path))
    assert "sigma-0.5-seed-0: recorded" in capsys.readouterr().out
    for path, changed in before.items():
        assert (path.stat().st_mtime_ns == changed) == ("sigma" in path.name)
    assert read_record(tmp_path / "records" / "random-0-seed-0.json").scores == drawn.scores

    with pytest.raises(SystemExit, match="other settings"):
        main(arguments(tmp_path, retrain_steps=31))
