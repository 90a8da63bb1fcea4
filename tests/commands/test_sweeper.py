"""Studies of Optuna: what is searched, what counts, what is tried again, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from anomaly_lit.runs.objective import check_objective, direction_of, objective
from anomaly_lit.types import UserError

Run = Callable[..., Any]
SPACE = ["x=interval(-1.0,1.0)"]


# ------------------------------------------------------------------------------- objectives


def config(metric: str | None, **dataset: Any) -> dict[str, Any]:
    return {"optimized_metric": metric, "dataset": {"holdout": 0.2, **dataset}}


def test_what_is_optimised_is_normal_or_made_up() -> None:
    check_objective(config(None))
    check_objective(config("val/loss"))
    check_objective(config("oracle/image_auroc"))
    check_objective(config("val/synthetic_pixel_ap", validate_on_synthesis=True))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (config("test/image_auroc"), "by the test set.*write oracle/image_auroc"),
        (config("test/bolt/image_auroc"), "write oracle/bolt/image_auroc"),
        (config("image_auroc"), "it is val/loss, val/synthetic_"),
        (config("val/loss", holdout=0.0), "dataset.holdout=0.2"),
        (config("val/synthetic_pixel_ap"), "dataset.validate_on_synthesis=true"),
    ],
)
def test_other_objectives_are_refused(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_objective(chosen)


def test_the_value_of_a_run() -> None:
    metrics = {"val/loss": 0.5, "test/image_auroc": 0.9, "val/synthetic_pixel_ap": None}
    assert objective(config(None), metrics) is None
    assert objective(config("val/loss"), metrics) == 0.5
    assert objective(config("oracle/image_auroc"), metrics) == 0.9
    value = objective(config("val/synthetic_pixel_ap"), metrics)
    assert value is not None
    assert math.isnan(value)
    with pytest.raises(UserError, match="known: val/loss, val/synthetic_pixel_ap, oracle/image"):
        objective(config("val/losses"), metrics)


def test_directions_follow_from_names() -> None:
    assert direction_of("val/loss") == "minimize"
    assert direction_of("val/synthetic_pixel_aupro_0.05") == "maximize"
    with pytest.raises(UserError, match=r"hydra\.sweeper\.direction"):
        direction_of("val/roundness")


def test_a_test_metric_is_refused_before_training(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    outcome = run_here(
        "train", *settings, f"dataset.root={mvtec_folder}", f"output_dir={tmp_path}",
        "optimized_metric=test/image_auroc",
    )  # fmt: skip
    assert outcome.code == 1
    assert "write oracle/image_auroc" in outcome.err
    assert not (tmp_path / "config.yaml").exists()


def test_a_missing_optuna_is_told_with_its_extra(
    run_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna.distributions", None)
    line = ("-m", "hydra/sweeper=optuna", "seed=1,2", f"output_dir={tmp_path}")
    outcome = run_here("train", *line)
    assert outcome.code == 1
    assert 'pip install "anomaly-lit[sweep]"' in outcome.err


# ----------------------------------------------------------------------------------- studies


class Toy:
    """A launcher whose jobs are a function of their values."""

    def __init__(self, function: Callable[[dict[str, float]], Any], folder: Path) -> None:
        self.function = function
        self.folder = folder
        self.seen: list[dict[str, float]] = []
        self.batches: list[int] = []

    def launch(self, lines: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.batches.append(len(lines))
        self.told = [word for line in lines for word in line if word.startswith("pruning=")]
        return [self.one(dict(word.split("=", 1) for word in line)) for line in lines]

    def one(self, words: dict[str, str]) -> JobReturn:
        values = {name: float(word) for name, word in words.items() if name in "xy"}
        self.seen.append(values)
        folder = {"hydra": {"runtime": {"output_dir": f"{self.folder}/x={values.get('x')}"}}}
        result = JobReturn(hydra_cfg=OmegaConf.create(folder), status=JobStatus.COMPLETED)
        try:
            result.return_value = self.function(values)
        except ZeroDivisionError as error:
            result.status = JobStatus.FAILED
            result.return_value = UserError(f"job failed: {error}")
        return result


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Toy]:
    """Calls the sweeper, ``study(function, lines, **settings)``, in one folder."""
    pytest.importorskip("optuna", minversion="4", reason="optuna is an optional package")
    from hydra_plugins.anomaly_lit_sweeper import StudySweeper

    def call(
        function: Callable[[dict[str, float]], Any],
        lines: Sequence[str] = SPACE,
        metric: str | None = "val/loss",
        sampler: str = "TPESampler",
        jobs: int = 1,
        interval: int = 5,
        **settings: Any,
    ) -> Toy:
        storage = f"sqlite:///{tmp_path / 'study.db'}"
        node = OmegaConf.create({"_target_": f"optuna.samplers.{sampler}", "seed": 0})
        sweeper = StudySweeper(node, **{"storage": storage, "n_trials": 4} | settings)
        trainer = {"max_steps": 10, "val_check_interval": interval}
        composed = OmegaConf.create(config(metric) | {"trainer": trainer})
        loader = SimpleNamespace(load_sweep_config=lambda *_: composed)
        sweeper.hydra_context = SimpleNamespace(config_loader=loader)  # type: ignore[assignment]
        sweeper.config = OmegaConf.create({"hydra": {"launcher": {"jobs": jobs}}})
        sweeper.folder = tmp_path
        sweeper.launcher = toy = Toy(function, tmp_path)  # type: ignore[assignment]
        sweeper.sweep(list(lines))
        return toy

    return call


def square(values: dict[str, float]) -> float:
    return values["x"] ** 2


def trials(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "study.json").read_text())["trials"]


def test_a_study_stops_at_its_number_of_trials(
    study: Callable[..., Toy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(study(square, n_trials=5).seen) == 5
    assert study(square, n_trials=5).seen == []
    assert len(study(square, n_trials=7).seen) == 2
    written = json.loads((tmp_path / "study.json").read_text())
    best = min(trial["value"] for trial in written["trials"])
    assert written["trials"][written["best"]]["value"] == best
    assert written["direction"] == "minimize"
    assert "7 of 7 trials have a result" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["TPESampler", "RandomSampler"])
def test_an_interrupted_study_asks_what_a_whole_one_does(
    study: Callable[..., Toy], tmp_path: Path, sampler: str
) -> None:
    first = study(square, sampler=sampler, n_trials=6).seen
    second = study(square, sampler=sampler, n_trials=12).seen
    (tmp_path / "study.db").unlink()
    assert study(square, sampler=sampler, n_trials=12).seen == first + second
    assert len({trial["x"] for trial in first + second}) == 12


def test_an_interrupted_trial_is_tried_again_with_the_same_values(
    study: Callable[..., Toy], tmp_path: Path
) -> None:
    seen = []

    def interrupted(values: dict[str, float]) -> float:
        seen.append(values)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return square(values)

    with pytest.raises(KeyboardInterrupt):
        study(interrupted)
    again = study(square).seen
    assert again[0] == seen[2]
    assert len(again) == 2
    assert [trial["state"] for trial in trials(tmp_path)].count("complete") == 4


def test_a_failed_trial_and_one_that_is_nan_are_no_results_and_tried_again(
    study: Callable[..., Toy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def some(values: dict[str, float]) -> float:
        calls.append(values)
        return {1: lambda: 1 / 0, 2: lambda: math.nan}.get(len(calls), lambda: square(values))()

    study(some)
    first = trials(tmp_path)
    assert [trial["state"] for trial in first] == ["fail", "fail", "complete", "complete"]
    assert first[0]["error"] == "job failed: division by zero"
    assert first[1]["error"] == "its value is nan"
    assert "2 of 4 trials have a result" in capsys.readouterr().out
    assert study(square).seen == calls[:2]
    assert study(square).seen == []


def test_failures_one_after_another_stop_the_study(study: Callable[..., Toy]) -> None:
    with pytest.raises(UserError, match=r"3 trials failed one after another.*division by zero"):
        study(lambda _: 1 / 0, n_trials=20)


def test_a_study_without_a_result_is_an_error(study: Callable[..., Toy]) -> None:
    with pytest.raises(UserError, match="no trial has a value of val/loss"):
        study(lambda _: math.nan, n_trials=2)


def test_batches_are_as_large_as_the_launcher_takes(study: Callable[..., Toy]) -> None:
    assert study(square, jobs=3, n_trials=7).batches == [3, 3, 1]


def test_the_same_values_twice_are_one_job(study: Callable[..., Toy], tmp_path: Path) -> None:
    toy = study(square, ["x=1,2"], jobs=4, n_trials=4)
    assert toy.batches[0] <= 2
    assert [trial["state"] for trial in trials(tmp_path)] == ["complete"] * 4


def test_another_search_in_the_same_study_is_refused(study: Callable[..., Toy]) -> None:
    study(square, [*SPACE, "y=1"])
    with pytest.raises(UserError, match=r"(?s)of another search.*settings: \[\"y=1\"\] there"):
        study(square, [*SPACE, "y=2"])
    with pytest.raises(UserError, match=r"space\.x"):
        study(square, ["x=interval(-2.0,1.0)", "y=1"])


def test_two_commands_at_one_study_are_refused(study: Callable[..., Toy]) -> None:
    def nested(values: dict[str, float]) -> float:
        with pytest.raises(UserError, match="another command works on the study"):
            study(square)
        return 0.0

    study(nested, n_trials=1)


MEDIAN = OmegaConf.create({"_target_": "optuna.pruners.MedianPruner"})


def test_a_pruned_trial_counts_and_is_not_tried_again(
    study: Callable[..., Toy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(values: dict[str, float]) -> float:
        if values["x"] < 0:
            folder = tmp_path / f"x={values['x']}"
            folder.mkdir()
            (folder / "pruned.json").write_text("{}")
        return square(values)

    toy = study(some, n_trials=5, pruner=MEDIAN)
    assert len(toy.seen) == 5
    states = {trial["parameters"]["x"] < 0: trial["state"] for trial in trials(tmp_path)}
    assert states == {True: "pruned", False: "complete"}
    assert "were pruned" in capsys.readouterr().out
    assert study(some, n_trials=5, pruner=MEDIAN).seen == []
    number = trials(tmp_path)[-1]["number"]
    assert toy.told == [
        "pruning={_target_:'anomaly_lit.callbacks.pruning.Pruning',metric:'val/loss',"
        f"storage:'sqlite:///{tmp_path / 'study.db'}',study:'study',trial:{number},"
        "pruner:{_target_:'optuna.pruners.MedianPruner'}}"
    ]


def test_a_trial_of_another_command_is_left_to_it(
    study: Callable[..., Toy], tmp_path: Path
) -> None:
    import optuna

    study(square, n_trials=1)
    whole = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'study.db'}")
    other = whole.ask()
    other.set_user_attr("sweep", "elsewhere")
    study(square, n_trials=2)
    assert [trial["state"] for trial in trials(tmp_path)] == ["complete", "running", "complete"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 10}, "val_check_interval=10 below trainer.max_steps=10"),
        ({"storage": None}, "jobs need hydra.sweeper.storage"),
        ({"metric": "oracle/image_auroc"}, "no validation measures oracle/image_auroc"),
    ],
)
def test_a_pruner_without_a_say_is_refused(
    study: Callable[..., Toy], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        study(square, pruner=MEDIAN, **settings)


@pytest.mark.parametrize(
    ("lines", "metric", "words"),
    [
        (["x=1"], "val/loss", "nothing to search"),
        (SPACE, None, "optimized_metric=val/loss"),
        (SPACE, "test/image_auroc", "write oracle/image_auroc"),
        (["x=interval(2.0,1.0)"], "val/loss", r"x=interval\(2.0,1.0\)"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    study: Callable[..., Toy], lines: list[str], metric: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        study(square, lines, metric)


def test_spaces_are_read_as_hydra_writes_them() -> None:
    distributions = pytest.importorskip("optuna.distributions")
    from hydra_plugins.anomaly_lit_sweeper.space import overrides_of, split

    fixed, space = split(
        [
            "mask=random,fixed_ratio", "a=1,2", "a=int(interval(1,4))", "seed=3", "seed=4",
            "lr=tag(log,interval(1e-5,1e-3))", "n=range(2,9,3)", "s=choice(true,'a b')",
        ]
    )  # fmt: skip
    assert fixed == ["seed=4"]
    assert space["mask"].choices == ("random", "fixed_ratio")
    assert space["a"] == distributions.IntDistribution(1, 4)
    assert space["lr"] == distributions.FloatDistribution(1e-5, 1e-3, log=True)
    assert space["n"].choices == (2, 5, 8)
    assert space["s"].choices == (True, "a\\ b")
    assert overrides_of({"s": None, "t": "a\\ b"}) == ["s=null", "t=a\\ b"]
    _, space = split(["c=[bolt],[cloth]", "d='x,y','x y'"])
    assert space["c"].choices == ("[bolt]", "[cloth]")
    assert space["d"].choices == ("'x,y'", "'x y'")


# ------------------------------------------------------------------------------- whole studies


def test_a_pruned_run_ends_early_and_can_go_on(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", minversion="4", reason="optuna is an optional package")
    own = [
        *settings, f"dataset.root={mvtec_folder}", "dataset.holdout=0.4", "trainer.max_steps=4",
        "trainer.val_check_interval=2", "optimized_metric=val/loss",
    ]  # fmt: skip
    nobody = "+hydra.sweeper.pruner={_target_:optuna.pruners.ThresholdPruner,upper:-1.0}"
    outcome = run_here(
        "train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", nobody, *own,
        "seed=7,7", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.code == 1
    assert "no trial has a value of val/loss" in outcome.err
    assert "pruned at step 2: val/loss=" in outcome.out
    [trial] = trials(tmp_path)
    folder = Path(trial["folder"])
    noted = json.loads((folder / "pruned.json").read_text())
    assert (noted["step"], noted["val/loss"]) == (2, pytest.approx(trial["value"]))
    assert trial["state"] == "pruned"
    assert not (folder / "metrics.json").exists()
    assert "pruning" not in folder.name
    outcome = run_here("train", *own, "seed=7", f"output_dir='{folder}'")
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "metrics.json").read_text())["resumed"]
    assert not (folder / "pruned.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_of_two_processes_each_trains_the_same_values_on_both(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    """Optuna, the process launcher and two ranks; the same command again finds nothing to do."""
    pytest.importorskip("optuna", minversion="4", reason="optuna is an optional package")
    line = [
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra/launcher=process",
        "hydra.launcher.jobs=2", *settings, f"dataset.root={mvtec_folder}", "dataset.holdout=0.4",
        "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2",
        "trainer.val_check_interval=2", "optimized_metric=val/loss",
        "method.sigma=interval(0.1,1.0)", f"output_dir={tmp_path}",
    ]  # fmt: skip
    outcome = run_here("train", *line)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\ntrial ") == 2
    for trial in trials(tmp_path):
        folder = Path(trial["folder"])
        metrics = json.loads((folder / "metrics.json").read_text())
        trained = yaml.safe_load((folder / "config.yaml").read_text())
        assert metrics["val/loss"] == pytest.approx(trial["value"])
        assert trained["method"]["sigma"] == trial["parameters"]["method.sigma"]
        assert trained["trainer"]["devices"] == 2  # and the ranks compared their configurations
    outcome = run_here("train", *line)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("trial 2") == 0
    assert "2 of 2 trials have a result" in outcome.out
    assert len(trials(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_of_ami_nets_mask_runs_and_goes_on(
    run_here: Run, settings: tuple[str, ...], mvtec_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", minversion="4", reason="optuna is an optional package")
    chosen = [word for word in settings if not word.startswith(("method=", "dataset="))]
    line = [
        "-m", "experiment=ami_net_mask_study", *chosen, f"dataset.root={mvtec_folder}",
        "dataset.categories=[bolt]", "dataset.holdout=0.4", "trainer.max_steps=2",
        "trainer.val_check_interval=2", f"output_dir={tmp_path}",
    ]  # fmt: skip
    for wanted in (1, 2):
        outcome = run_here("train", *line, f"hydra.sweeper.n_trials={wanted}")
        assert outcome.code == 0, outcome.err
        assert f"{wanted} of {wanted} trials have a result" in outcome.out
    assert len(trials(tmp_path)) == 2
    assert set(trials(tmp_path)[0]["parameters"]) == {
        "method.mask.low", "method.mask.high", "method.patch", "method.sigma"
    }  # fmt: skip
