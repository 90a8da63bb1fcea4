"""What a run prints at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_lit.reporting.terminal import UNTESTED, print_results, results_text

TESTED = {"selection": "last step", "test/nut/image_auroc": 0.5, "test/image_auroc": 0.5}


def test_a_tested_run_shows_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(TESTED, tmp_path)
    shown = capsys.readouterr().out
    assert "nut" in shown
    assert str(tmp_path / "images") in shown
    assert "50.0" in results_text(TESTED)


def test_a_run_without_test_images_shows_no_empty_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"selection": "last step", "val/loss": 0.5}
    print_results(metrics, tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown == [UNTESTED, f"Numbers:  {tmp_path / 'metrics.json'}"]
    assert results_text(metrics) == UNTESTED
