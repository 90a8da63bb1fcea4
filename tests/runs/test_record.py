"""What a run notes about its test."""

from __future__ import annotations

import pytest

from anomaly_lit.runs.record import partly


@pytest.mark.parametrize(("limit", "noted"), [(1.0, False), (None, False), (1, True), (0.5, True)])
def test_a_test_of_a_part_says_so_beside_its_numbers(
    limit: int | float | None, noted: bool
) -> None:
    found = partly({"trainer": {"limit_test_batches": limit}})
    assert found == [f"PART of the test images: trainer.limit_test_batches={limit}"] * noted
