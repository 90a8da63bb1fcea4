"""The report of a folder: rows, tables in four forms, and a page that a browser opens."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from anomaly_lit.commands.report import main
from anomaly_lit.reporting.page import cells
from anomaly_lit.reporting.read import flat, read_runs
from anomaly_lit.reporting.rows import name_groups, rows_of
from anomaly_lit.reporting.tables import as_latex, as_markdown, cell, table

CATEGORIES = ("bolt", "cloth")


def write_run(folder: Path, value: float | None = 0.9, **settings: Any) -> None:
    """A run as the commands leave it; without a value it has no results."""
    folder.mkdir(parents=True)
    config = {
        "output_dir": str(folder),
        "seed": settings.get("seed", 0),
        "method": {
            "_target_": settings.get("method", "anomaly_lit.methods.UniAD"),
            "backbone": {"_target_": "x", "name": settings.get("backbone", "resnet18.tv_in1k")},
        },
        "dataset": settings.get("dataset", {"categories": settings.get("categories", ["bolt"])}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if value is None:
        return
    keys = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
    tested = settings.get("tested", config["dataset"].get("categories"))
    metrics = {f"test/{category}/{key}": value for category in tested for key in keys}
    metrics |= {
        "seed": config["seed"], "selection": settings.get("selection", "last step"),
        "commit": "abc", "hardware": "CPU", "command": "anomaly-train a=1",
        "training_seconds": 120.0, "latency_seconds": 0.03, "peak_memory_mb": 1500.0,
        "trainable_parameters": 4052160,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = folder / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,train/loss,val/loss\n9,0.5,\n19,0.25,\n19,,0.3\n")
    (folder / "images").mkdir()
    picture = Image.new("RGB", (40, 20), (200, 30, 30))
    for name in ("000_missed_bolt_scratch_001", "001_false_alarm_bolt_good_002"):
        picture.save(folder / "images" / f"{name}.png")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two backbones, two seeds of two categories each; one run failed, one has several classes."""
    root = tmp_path / "sweep"
    number = 0
    for backbone, value in (("resnet18.tv_in1k", 0.8), ("resnet50.tv_in1k", 0.9)):
        for seed in (0, 1):
            for category in CATEGORIES:
                absent = backbone[6:8] == "50" and seed == 1 and category == "cloth"
                score = None if absent else value + 0.02 * seed
                write_run(
                    root / str(number), score, backbone=backbone, seed=seed, categories=[category]
                )
                number += 1
    write_run(root / "all", 0.7, categories=list(CATEGORIES))
    return root


def test_rows_gather_seeds_and_categories(sweep: Path) -> None:
    rows = rows_of(read_runs(sweep))
    assert {row.name: len(row.runs) for row in rows} == {
        "UniAD one-class backbone=resnet18": 4,
        "UniAD one-class backbone=resnet50": 4,
        "UniAD multi-class backbone=resnet18": 1,
    }


@pytest.mark.parametrize(
    ("dataset", "tested"),
    [
        ({"category": "product"}, ["product"]),
        ({"categories": "all", "layout": {"category": "clips"}}, ["clips"]),
        ({"categories": "all", "layout": {"frames": 4}, "root": "ped2"}, ["ped2"]),
        ({"categories": "all", "root": "demo"}, ["gear", "wood"]),
        ({"categories": ["wood", "gear"]}, ["gear", "wood"]),
    ],
)
def test_seeds_without_results_stand_beside_those_with(
    tmp_path: Path, dataset: dict[str, Any], tested: list[str]
) -> None:
    for seed, value in enumerate((0.9, None)):
        write_run(tmp_path / str(seed), value, seed=seed, dataset=dataset, tested=tested)
    head, row = table(rows_of(read_runs(tmp_path)), "image_auroc")
    assert head == ["image AUROC", *tested, "mean", "seeds"]
    assert row == ["UniAD", *["90.0"] * len(tested), "90.0", "2"]


def test_no_category_and_no_setting_is_made_up(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, dataset={"category": "product"})
    write_run(tmp_path / "b", None, dataset={"categories": "all"})
    write_run(tmp_path / "c", None, dataset={"categories": ["nut", "bolt"]})
    rows = rows_of(read_runs(tmp_path))
    assert [row.name for row in rows] == [
        "UniAD all categories", "UniAD multi-class", "UniAD one-class"
    ]  # fmt: skip
    head = table(rows, "image_auroc")[0]
    assert head == ["image AUROC", "bolt", "nut", "product", "mean", "seeds"]


def test_own_folders_are_columns_of_one_row(tmp_path: Path) -> None:
    for name in ("nut", "bolt"):
        write_run(tmp_path / name, dataset={"category": name, "root": name}, tested=[name])
    head, row = table(rows_of(read_runs(tmp_path)), "image_auroc")
    assert head == ["image AUROC", "bolt", "nut", "mean", "seeds"]
    assert row == ["UniAD", "90.0", "90.0", "90.0", "1"]


def test_a_category_with_a_slash_keeps_its_results(tmp_path: Path) -> None:
    write_run(tmp_path / "a", dataset={"category": "a/b"}, tested=["a/b"])
    assert table(rows_of(read_runs(tmp_path)), "image_auroc")[1] == ["UniAD", "90.0", "90.0", "1"]


def test_table_has_means_deviations_and_gaps(sweep: Path) -> None:
    lines = {line[0]: line[1:] for line in table(rows_of(read_runs(sweep)), "image_auroc")}
    assert lines["image AUROC"] == ["bolt", "cloth", "mean", "seeds"]
    assert lines["UniAD one-class backbone=resnet18"] == ["81.0 ± 1.4"] * 3 + ["2"]
    assert lines["UniAD one-class backbone=resnet50"] == ["91.0 ± 1.4", "90.0", "90.0", "2"]
    assert lines["UniAD multi-class backbone=resnet18"] == ["70.0", "70.0", "70.0", "1"]


def test_four_files_are_written_and_nothing_else_is_touched(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(sweep.rglob("*"))
    main([str(sweep)])
    assert "8 of 9 runs have results, in 3 rows" in capsys.readouterr().out
    report = sweep / "report"
    assert {p.suffix for p in report.iterdir()} == {".csv", ".md", ".tex", ".html"}
    assert [p for p in sorted(sweep.rglob("*")) if report not in (p, p.parent)] == before
    with (report / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9  # seven of one category, one of two
    assert rows[0]["command"] == "anomaly-train a=1"
    main([str(sweep)])  # again, over itself


def test_markdown_and_latex_are_well_formed(sweep: Path) -> None:
    rows = rows_of(read_runs(sweep))
    for block in as_markdown(rows).split("\n\n")[:-1]:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    text = as_latex(rows)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 7
    assert r"81.0 $\pm$ 1.4" in text
    assert not re.search(r"(?<!\\)_", text.split("\n%")[0])


def test_what_was_chosen_on_the_test_set_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "a", selection="ORACLE: best image + pixel AUROC on the test set")
    assert "took something from the test set" in as_markdown(rows_of(read_runs(tmp_path)))


def test_what_learned_from_test_images_is_marked_wherever_its_numbers_are(tmp_path: Path) -> None:
    write_run(tmp_path / "a", selection="last step; SEEN: learned from 3 test images of each ...")
    write_run(tmp_path / "b", method="anomaly_lit.methods.PNI")
    main([str(tmp_path)])
    texts = {p.suffix: p.read_text(encoding="utf-8") for p in (tmp_path / "report").iterdir()}
    for suffix, name in ((".csv", "UniAD †"), (".md", "UniAD †"), (".html", "UniAD †"),
                         (".tex", r"UniAD $\dagger$")):  # fmt: skip
        assert name in texts[suffix]
        assert "PNI †" not in texts[suffix]
    for suffix in (".md", ".tex", ".html"):
        assert "† 1 runs learned from real defects of the test set" in texts[suffix]
    tables = [block for block in texts[".md"].split("\n\n") if block.startswith("|")]
    assert len(tables) == 7
    assert all("UniAD †" in block for block in tables)


def test_without_such_runs_there_is_no_mark(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    assert "†" not in as_markdown(rows_of(read_runs(tmp_path)))


def texts_of(folder: Path) -> dict[str, str]:
    main([str(folder)])
    return {p.suffix: p.read_text(encoding="utf-8") for p in (folder / "report").iterdir()}


def keep_metrics(run: Path, *kept: str, **added: Any) -> None:
    """Rewrite a run's results with some of their test metrics alone, and others."""
    file = run / "metrics.json"
    metrics = {k: v for k, v in json.loads(file.read_text()).items() if k[:5] != "test/"}
    file.write_text(json.dumps(metrics | dict.fromkeys(kept, 0.25) | added))


def test_without_test_images_there_is_no_table_of_dashes(tmp_path: Path) -> None:
    write_run(tmp_path / "a", dataset={"category": "product"}, tested=[])
    texts = texts_of(tmp_path)
    for suffix in (".md", ".tex", ".html"):
        assert "AUROC" not in texts[suffix]
        assert "1 runs had no test images." in texts[suffix]
    assert texts[".csv"].splitlines()[1].startswith(f"UniAD,{tmp_path / 'a'},product,")


def test_a_test_on_normal_images_shows_its_false_alarms(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    keep_metrics(tmp_path / "a", "test/bolt/false_positive_rate", **{"test/bolt/image_ap": None})
    texts = texts_of(tmp_path)
    [shown, _] = [block for block in texts[".md"].split("\n\n") if block.startswith("|")]
    assert shown.splitlines()[0] == "| false alarms | bolt | mean | seeds |"
    assert shown.splitlines()[2] == "| UniAD | 25.0 | 25.0 | 1 |"
    assert "had no test images" not in texts[".md"]
    write_run(tmp_path / "b", tested=["bolt"], dataset={"categories": ["bolt"], "masks": "none"})
    keep_metrics(tmp_path / "b", "test/bolt/false_positive_rate", "test/bolt/image_auroc")
    blocks = texts_of(tmp_path)[".md"].split("\n\n")
    assert [block.split(" | ")[0] for block in blocks[:2]] == ["| image AUROC", "| false alarms"]
    shutil.rmtree(tmp_path / "a")
    assert "false alarms" not in texts_of(tmp_path)[".md"]  # no run has only these


def test_a_test_without_any_value_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    keep_metrics(tmp_path / "a", **{"test/bolt/image_auroc": None})
    text = texts_of(tmp_path)[".md"]
    assert "1 runs were tested without any metric" in text
    assert "image AUROC" not in text


def test_page_is_one_file_that_asks_for_nothing(sweep: Path) -> None:
    main([str(sweep)])
    text = (sweep / "report" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert text.count("<table>") == 9
    assert text.count("data:image/jpeg") == 2 * 3  # two images, by three rows
    assert "missed_" not in text.split("<h3>", 1)[1].split("</h3>")[0]


@pytest.mark.slow
def test_page_opens_in_a_browser(sweep: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    main([str(sweep)])
    address = (sweep / "report" / "report.html").as_uri()
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    for width in (1280, 500):
        picture = tmp_path / f"{width}.png"
        size = [f"--window-size={width},900", f"--screenshot={picture}"]
        done = subprocess.run([*line, *size, address], capture_output=True, text=True, timeout=100)
        assert "Uncaught" not in done.stderr
        with Image.open(picture) as shown:
            assert shown.width == width
            assert len(shown.convert("RGB").getcolors(1 << 24) or []) > 20
    done = subprocess.run(
        [*line, "--dump-dom", address], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.count("<tr>") >= 9


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run"):
        main([str(tmp_path)])


def test_names_tell_what_differs_within_a_method() -> None:
    settings = [
        {"method._target_": "a.UniAD", "method.backbone.name": "resnet18.tv", "method.dim": 8},
        {"method._target_": "a.UniAD", "method.backbone.name": "resnet50.tv", "method.dim": 8},
        {"method._target_": "a.DSR", "method.dim": 9},
    ]
    assert name_groups(settings) == ["UniAD backbone=resnet18", "UniAD backbone=resnet50", "DSR"]


def test_cells() -> None:
    assert cell([]) == "-"
    assert cell([0.5]) == "50.0"
    assert cell([0.5, 0.6]) == "55.0 ± 7.1"
    assert flat({"a": {"b": [1, 2], "c": None}, "d": {}}) == {
        "a.b": "[1, 2]",
        "a.c": None,
        "d": "{}",
    }


def test_text_cannot_break_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "<b>", categories=["<i>bolt"], method="x.<u>")
    metrics = json.loads((tmp_path / "<b>" / "metrics.json").read_text())
    metrics |= {"command": "</td><script>alert(1)</script>" * 3, "hardware": '"><script>'}
    (tmp_path / "<b>" / "metrics.json").write_text(json.dumps(metrics))
    main([str(tmp_path)])
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.count("<script>") == 1  # the page's own
    assert not re.search("<[biu]>", text)
    assert "&lt;i&gt;bolt" in text


def test_cells_are_shaded_between_the_ends_of_their_column() -> None:
    lines = [["name", "a", "b"], ["x", "1.0", "5.0"], ["y", "3.0 ± 0.1", "5.0"], ["z", "2.0", "-"]]
    hues = [[hue for _, hue in line] for line in cells(lines, shaded=True)]
    assert hues == [[None, 10, None], [None, 120, None], [None, 65, None]]
    assert {hue for line in cells(lines) for _, hue in line} == {None}


def bomb(levels: int = 60) -> str:
    """A text that stands for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


BROKEN = {
    "config.yaml": {
        "cut off": "method: {a: [1,",
        "empty": "",
        "a list": "- a\n- b",
        "not text": b"\xff\xfe\x00",
        "alias bomb": bomb(),
        "merge bomb": "\n".join(
            [
                "a0: &a0 {x: 1}",
                *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)),
            ]
        ),
        "text bomb": f"a: &a {'x' * 9000}\nb: [{', '.join(['*a'] * 9000)}]",
        "contains itself": "a: &a [*a]",
        "deep in brackets": "a: " + "[" * 50_000 + "]" * 50_000,
        "deep in dashes": "- " * 50_000,
        "impossible date": "a: 2020-13-45",
        "a tag": "a: !!python/object/apply:os.getcwd []",
    },
    "metrics.json": {
        "cut off": '{"test/bolt/image_auroc": 0.',
        "empty": "",
        "a list": "[1]",
        "not text": b"\xff\xfe\x00",
        "deep": "[" * 50_000,
        "text for a number": '{"test/bolt/image_auroc": "high"}',
        "text for a cost": '{"training_seconds": "long"}',
        "list for a seed": '{"seed": [1]}',
        "too great a number": '{"test/bolt/image_auroc": 1' + "0" * 400 + "}",
    },
}


@pytest.mark.parametrize(
    ("name", "content"),
    [pytest.param(n, c, id=f"{n}, {k}") for n, kinds in BROKEN.items() for k, c in kinds.items()],
)
@pytest.mark.timeout(30)  # a bomb that goes off takes hours
def test_a_broken_run_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes
) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", value=0.1)
    file = tmp_path / "bad" / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert "1 of 1 runs have results" in out
    assert err.count("\n") == 1
    assert err.startswith(f"warning: cannot read {file}: ")
    assert err.endswith("; the report leaves this run out\n")
    assert len(err) < 600
    for suffix in ("csv", "md", "tex", "html"):
        assert "bad" not in (tmp_path / "report" / f"report.{suffix}").read_text()


def test_a_job_that_failed_before_it_was_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good")
    files = {"failed": (1, "no such\nfile"), "silent": (137, ""), "waits": (None, ""), "": (0, "")}
    for name, (code, error) in files.items():
        (tmp_path / name).mkdir(exist_ok=True)
        facts = json.dumps({"exit_code": code, "error": error})
        (tmp_path / name / "job.json").write_text(facts)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "job.json").write_text("[]")
    main([str(tmp_path)])
    end = "; the report leaves this job out"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path / 'failed'} failed before it began: no such file{end}",
        f"warning: {tmp_path / 'silent'} failed before it began: see its job.log{end}",
    ]


def test_small_aliases_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text() + "a: &a [1, 2]\nb: *a\nc: &c {d: 3}\ne: {<<: *c}\n")
    [run] = read_runs(tmp_path)
    assert (run.settings["b"], run.settings["e.d"]) == ("[1, 2]", 3)


def test_only_broken_runs_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "metrics.json").write_text("{")
    with pytest.raises(SystemExit, match="no run"):
        main([str(tmp_path)])
    assert "metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"step,train/loss\nnine,0.5\n", b"step,train/loss\n9,\xff\n"])
def test_broken_logs_and_panels_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    write_run(tmp_path / "run")
    log = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
    log.write_bytes(content)
    panel = tmp_path / "run" / "images" / "000_missed_bolt_scratch_001.png"
    panel.write_bytes(panel.read_bytes()[:40])
    main([str(tmp_path)])
    err = capsys.readouterr().err
    assert str(log) in err
    assert str(panel) in err
    assert err.count("warning: ") == err.count("\n") == 2
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/jpeg") == 1


def test_a_place_that_cannot_be_written_and_a_negative_count_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="choose another --output"):
        main([str(tmp_path), "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--pictures", "-1"])
    assert stopped.value.code == 2
    assert "--pictures -1" in capsys.readouterr().err
