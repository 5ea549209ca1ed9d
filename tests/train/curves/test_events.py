"""What TensorBoard makes of a run's files, asked of TensorBoard's own code."""

from __future__ import annotations

import doctest
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from engine.config import MonitorConfig, OptimConfig, RunConfig, TrainConfig
from engine.model.bert_entry import BERT
from engine.optim.layout import ParameterNorms
from engine.tasks.task import Evaluation
from engine.train.curves import events, titles
from engine.train.curves.monitor import Monitor, write_report
from engine.train.curves.norms import curves
from tests.train.runs import losses

REPORT = "accuracy 0.9000\n\n              precision    recall\n       fruit     0.9000    0.8000"
TUNED = OptimConfig(name="lamb", learning_rate=3e-3, betas=(0.9, 0.98))


def write_a_run(folder: Path, learning_rate: float) -> None:
    """A run of four steps with an evaluation and a report on a test file, as the loop and the final report write it."""
    config = RunConfig(output=str(folder), train=TrainConfig(steps=4, global_batch=8))
    config.optim = OptimConfig(name="lamb", learning_rate=learning_rate, betas=(0.9, 0.98))
    config.monitor = MonitorConfig(csv=True)
    monitor = Monitor(config, 0)
    monitor.begin(config)
    for step in (1, 2, 3, 4):
        monitor.scalars({"train/loss": 5.0 - step, "train/tokens_per_second": 100.0}, step)
    monitor.scalars({"eval/accuracy": 0.75}, 4)
    monitor.end(4)
    write_report(config, 4, "test", Evaluation({"accuracy": 0.9, "loss": 0.1}), REPORT)
    write_report(config, 4, "test", Evaluation({"accuracy": 0.9, "loss": 0.1}), REPORT)


@pytest.fixture(scope="module")
def folder(one_rank: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, whose rates differ."""
    output = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 1e-3), ("b", 3e-3)):
        one_rank.apply(write_a_run, (output / name, rate))
    return output


def hparams_page(folder: Path) -> tuple[Any, Any]:
    """The experiment and the rows that the HParams page of TensorBoard gets."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    content = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, content, [])
    columns = [api_pb2.ColParams(hparam=info.name) for info in experiment.hparam_infos]
    columns += [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS], col_params=columns, slice_size=10, include_metrics=True
    )
    return experiment, Handler(RequestContext(), context, "", request).run()


def test_the_hparams_page_compares_runs_by_their_values_and_results(folder: Path) -> None:
    experiment, page = hparams_page(folder)
    assert {"optim.learning_rate", "train.global_batch", "seed"} <= {info.name for info in experiment.hparam_infos}
    assert "test accuracy [share]" in {info.display_name for info in experiment.metric_infos}
    assert {info.type for info in experiment.hparam_infos if info.name == "optim.nvlamb"} == {api_pb2.DATA_TYPE_BOOL}
    rows = {row.name: row for row in page.session_groups}
    assert set(rows) == {"a/tensorboard", "b/tensorboard"}  # rows of their own, and no runs beside the runs
    for name, rate in (("a/tensorboard", 1e-3), ("b/tensorboard", 3e-3)):
        values = rows[name].hparams
        assert values["optim.learning_rate"].number_value == rate
        assert values["train.steps"].number_value == 4
        assert values["optim.name"].string_value == "lamb"
        assert values["optim.betas"].string_value == "(0.9, 0.98)"
        assert values["optim.nvlamb"].bool_value is False
        assert "model.init_from" not in values
        results = {one.name.tag: one.value for one in rows[name].metric_values}
        assert results == pytest.approx(
            {"test/accuracy": 0.9, "test/loss": 0.1, "eval/accuracy": 0.75, "train/loss": 1.0}
            | {"train/tokens_per_second": 100.0}
        )


def test_the_final_report_is_there_with_its_scores_once(folder: Path) -> None:
    assert losses(folder / "a", "test/accuracy") == [(4, pytest.approx(0.9))]
    accumulator = EventAccumulator(str(folder / "a" / "tensorboard"))
    accumulator.Reload()
    text = accumulator.Tensors("report/test/text_summary")[0].tensor_proto.string_val[0].decode()
    assert REPORT in text
    assert [event.step for event in accumulator.Scalars("test/loss")] == [4]
    assert (folder / "a" / "csv" / "test_accuracy.csv").read_text().split() == ["step,accuracy", "4,0.9"]


def test_the_report_disturbs_no_curve(folder: Path) -> None:
    assert losses(folder / "a") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]


def test_curves_have_titles_with_units_also_for_the_fast_loader(folder: Path) -> None:
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR

    accumulator = EventAccumulator(str(folder / "a" / "tensorboard"))
    accumulator.Reload()
    shown = accumulator.SummaryMetadata("train/tokens_per_second")
    assert shown.display_name == "throughput [tokens/s]"
    assert "saves" in shown.summary_description
    # without a data class TensorBoard's own loader takes the point, and drops what it is called
    assert shown.data_class == DATA_CLASS_SCALAR


def test_titles_are_as_the_examples_say() -> None:
    assert doctest.testmod(titles).failed == 0
    assert doctest.testmod(events).failed == 0


def test_norms_have_titles() -> None:
    names = [f"bert.encoder.layer.{index}.output.dense.weight" for index in range(3)]
    values = curves({name: ParameterNorms(1.0, 0.1, 2.0) for name in names}, BERT.layer_of)
    assert len(values) == 12
    for tag in values:
        assert titles.title_of(tag).name != tag
        assert titles.title_of(tag).description


def test_an_unknown_curve_keeps_its_tag() -> None:
    assert titles.title_of("train/something") == titles.Title("train/something", "")


def test_every_result_is_a_curve_with_a_title() -> None:
    assert all(titles.title_of(tag).description for tag in events.results())


def test_a_record_that_a_crash_cut_off_hides_no_earlier_point(folder: Path, tmp_path: Path) -> None:
    source = min((folder / "a" / "tensorboard").iterdir())
    content = source.read_bytes()
    (tmp_path / source.name).write_bytes(content[: len(content) - 5])
    assert events.points_at(tmp_path, 4)["train/loss"] == 1.0
    assert events.points_at(tmp_path, 9) == {}
