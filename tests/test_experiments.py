"""The tables under experiments/ are what their runs' metrics.json files give, to the letter."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("experiments/*/runs"))


def load_tables(folder="."):
    file = ROOT / "experiments" / folder / "tables.py"
    spec = importlib.util.spec_from_file_location(f"tables_{folder}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_generated_from_the_metrics_of_the_runs(folder):
    tables = load_tables()
    runs = tables.read_runs(folder)
    assert (folder / "results.csv").read_text(encoding="utf-8") == tables.as_csv(runs)
    written = (folder / "README.md").read_text(encoding="utf-8")
    generated = written.split(tables.BEGIN)[1].split(tables.END)[0].lstrip("\n")
    assert generated == tables.as_markdown(runs)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_carries_its_commit_seed_hardware_and_command(folder):
    for run in load_tables().read_runs(folder):
        assert run["commit"], run["run"]
        assert not str(run["commit"]).endswith("+changes"), run["run"]
        assert f"seed={run['seed']}" in str(run["command"])
        assert run["hardware"]


def test_the_comparison_is_generated_from_all_runs():
    tables = load_tables()
    written = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    generated = written.split(tables.BEGIN)[1].split(tables.END)[0].lstrip("\n")
    assert generated == tables.comparison(ROOT / "experiments")


def test_runs_that_learned_from_test_images_are_marked_in_every_table(tmp_path):
    tables = load_tables()
    source = next((ROOT / "experiments" / "dsr" / "runs").glob("*toothbrush*.json"))
    metrics = json.loads(source.read_text())
    folder = tmp_path / "prn"
    (folder / "runs").mkdir(parents=True)
    metrics["selection"] = "last step; SEEN: learned from 3 test images of each defect type"
    (folder / "runs" / source.name).write_text(json.dumps(metrics))
    shutil.copy(ROOT / "experiments" / "baselines.csv", tmp_path)
    for text in (tables.as_markdown(tables.read_runs(folder)), tables.comparison(tmp_path)):
        assert "| one-class † |" in text
        assert "† learned from real defects of the test set" in text


@pytest.mark.parametrize("page", ["docs/choosing_a_method.md", "experiments/README.md"])
def test_the_pages_on_small_runs_say_what_results_csv_says(page):
    tables = load_tables("small")
    expected = tables.pages(tables.read(tables.RESULTS), tables.baselines())[ROOT / page]
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written.split(tables.BEGIN)[1].split(tables.END)[0].lstrip("\n") == expected


def test_every_preset_that_the_tables_name_is_one():
    tables = load_tables("small")
    for row in tables.read(tables.RESULTS):
        preset = re.match(r"`(\w+)`", tables.preset_of(row["method"]))[1]
        assert (ROOT / "conf" / "method" / f"{preset}.yaml").exists(), row["method"]
    assert tables.preset_of("dinomaly_336") == "`dinomaly_small`, 336 px"
    assert tables.preset_of("rstpm_lite0") == "`rstpm_small`, Lite0"
    assert tables.preset_of("uniad") == "`uniad_small`"


def test_seeds_are_averaged_and_a_missing_value_is_not_made_up():
    tables = load_tables("small")
    row = tables.read(tables.RESULTS)[0]
    first = {**row, "seed": "0", "image_auroc": "0.5", "pixel_ap": "0.2"}
    second = {**row, "seed": "1", "image_auroc": "0.75", "pixel_ap": ""}
    first["training_loss_falling"], second["training_loss_falling"] = "0.1", ""
    other = {**row, "seed": "0", "category": "another"}
    both, alone = tables.over_seeds([first, other, second])
    assert both["image_auroc"] == "0.625"
    assert both["seed"] == "0, 1"
    assert (both["pixel_ap"], both["training_loss_falling"]) == ("", "")
    assert (alone["category"], alone["seed"]) == ("another", "0")


def test_one_model_for_all_is_told_from_one_for_each():
    tables = load_tables("small")
    row = tables.read(tables.RESULTS)[0]
    assert tables.mark([{**row, "setting": "multi-class"}]) == ", one model"
    assert tables.mark([{**row, "setting": "one-class"}]) == ""


def test_candidates_are_the_best_of_the_first_pass_in_their_longest_runs():
    tables = load_tables("small")
    row = {**tables.read(tables.RESULTS)[0], "setting": "one-class", "selection": "last step"}

    def runs(method, steps, seconds, auroc, categories=tables.FIRST):
        facts = {"method": method, "steps": steps, "training_cpu_seconds": seconds}
        return [{**row, **facts, "image_auroc": auroc, "category": name} for name in categories]

    rows = [
        *runs("a", "10", "100", "0.9"),
        *runs("a", "20", "200", "0.8"),  # the longest of the first pass
        *runs("a", "90", "700", "0.7"),
        *runs("a", "99", "900", "0.7"),  # too long
        *runs("b", "10", "230", "0.6"),
        *runs("c", "10", "250", "0.9"),  # too long for the first pass
        *runs("d", "10", "50", "0.9", tables.FIRST[:2]),  # not on all categories
        *(row for n in range(4) for row in runs(f"e{n}", "10", "9", "0.7")),
    ]
    first = tables.first_pass(rows)
    assert {row["method"] for row in first} == {"a", "b", "e0", "e1", "e2", "e3"}
    found = {(row["method"], row["steps"]) for row in tables.candidates(rows, first)}
    assert found == {("a", "20"), ("a", "90"), ("e0", "10"), ("e1", "10"), ("e2", "10")}


def test_every_small_run_carries_its_commit_seed_hardware_and_command():
    tables = load_tables("small")
    for row in tables.read(tables.RESULTS):
        assert row["commit"], row
        assert not row["commit"].endswith("+changes"), row
        assert f"seed={row['seed']}" in row["command"]
        assert re.search(f"experiment=(small|long|full)_{row['method']}\\b", row["command"])
        assert row["hardware"]


def test_a_mean_needs_every_category():
    tables = load_tables("small")
    own = [{"category": "a", "pixel_ap": "0.5"}, {"category": "b", "pixel_ap": "0.7"}]
    assert tables.mean_of(own, "pixel_ap", ["a", "b"]) == pytest.approx(0.6)
    assert tables.mean_of(own, "pixel_ap", ["a", "b", "c"]) is None
    assert tables.mean_of([{**own[0], "pixel_ap": ""}], "pixel_ap", ["a"]) is None


def test_the_page_on_memories_says_what_results_csv_says():
    tables = load_tables("memory")
    rows = tables.read()
    written = tables.PAGE.read_text(encoding="utf-8")
    generated = written.split(tables.BEGIN)[1].split(tables.END)[0].lstrip("\n")
    assert generated == tables.as_markdown(rows)
    assert tables.as_csv(rows) == tables.RESULTS.read_text(encoding="utf-8")
    for row in rows:
        assert row["commit"], row
        assert not row["commit"].endswith("+changes"), row
        assert row["hardware"]
