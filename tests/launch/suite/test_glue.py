"""GLUE's files as usual downloads have them, and real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.labelled.files import read_examples
from engine.errors import UserError
from launch.suite.glue import GLUE, glue_data, write_copy
from tests.launch.suite.files import write_rows

#: the headers of the files of gluebenchmark.com
HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}


def write_table(path: Path, header: str, label: str = "1") -> None:
    names = header.split("\t")
    row = "\t".join(label if index == len(names) - 1 else f'the "{name}' for index, name in enumerate(names))
    path.write_text(f"{header}\n{row}\n")


@pytest.mark.parametrize("name", HEADERS)
def test_a_task_is_known_from_its_tables(name: str, tmp_path: Path) -> None:
    dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
    header = HEADERS[name]
    last_label = header if name != "mrpc" else header.removeprefix("\ufeff")
    for file in ("train.tsv", dev):
        if name == "mrpc":
            (tmp_path / file).write_text(f"{header}\n1\t2\t3\ta b\tc d\n")
        else:
            write_table(tmp_path / file, last_label)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta b\n")  # without labels
    options = glue_data(name, tmp_path, tmp_path / "copies", dev_is_test=False).options
    assert options["labelled.validation"] == str(tmp_path / dev)
    assert "labelled.test" not in options
    text, pair, label = (options[f"labelled.{part}"] for part in ("text", "text_pair", "label"))
    examples = read_examples(str(options["labelled.train"]), str(text), pair and str(pair), str(label))
    assert examples.labels == ["1"]
    assert (examples.pairs is None) is (name == "sst2")
    honest = glue_data(name, tmp_path, tmp_path / "copies", dev_is_test=True).options
    assert honest["labelled.test"] == str(tmp_path / dev)
    assert "labelled.validation" not in honest


def test_colas_tables_get_a_header(tmp_path: Path) -> None:
    for file in ("train", "dev"):
        (tmp_path / f"{file}.tsv").write_text("gj04\t1\t\tOur friends \"won't buy it.\ngj04\t0\t*\tThe book was.\n")
    data = glue_data("cola", tmp_path, tmp_path / "copies", dev_is_test=False)
    assert data.options["labelled.train"] == str(tmp_path / "copies" / "train.tsv")
    assert not (tmp_path / "copies").exists()
    for target, source in data.copies.items():
        write_copy(target, source)
    examples = read_examples(str(data.options["labelled.train"]), "sentence", None, "label")
    assert examples.labels == ["1", "0"]
    assert examples.texts == ["Our friends \"won't buy it.", "The book was."]
    assert data.options["labelled.metric"] == "matthews"


def test_columns_of_the_datasets_library_are_known_and_hidden_labels_are_no_test(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation_matched.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [rows[0] | {"label": -1}])
    options = glue_data("mnli", tmp_path, tmp_path, dev_is_test=False).options
    assert (options["labelled.text"], options["labelled.text_pair"]) == ("premise", "hypothesis")
    assert "labelled.test" not in options


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.jsonl"], r"folder: .* must have one file dev or validation \(.tsv, .jsonl, ...\), and has none"),
        (
            ["train.jsonl", "train.tsv", "dev.jsonl"],
            r"folder: .* must have one file train .*, and has train.tsv, train.jsonl",
        ),
        (["train.jsonl", "dev.jsonl"], r"train.jsonl, line 1: no column 'sentence1'; it has text; set labelled.text"),
    ],
)
def test_a_folder_that_is_none_of_the_task_is_named(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        write_rows(tmp_path / file, [{"text": "a"}])
    with pytest.raises(UserError, match=message):
        glue_data("rte", tmp_path, tmp_path, dev_is_test=False)


@pytest.mark.parametrize(("name", "folder", "tested"), [
    ("rte", "rte", False), ("mrpc", "mrpc", True), ("stsb", "stsb", True), ("sst2", "sst2_glue", False),
])  # fmt: skip
def test_real_files_are_read(shared_data: Path, name: str, folder: str, tested: bool) -> None:
    options = glue_data(name, shared_data / folder, shared_data, dev_is_test=True).options
    assert options["task"] == GLUE[name].task
    assert Path(str(options["labelled.test"])).name == ("test.jsonl.gz" if tested else "dev.jsonl.gz")
    pair = options["labelled.text_pair"]
    columns = (str(options["labelled.text"]), pair and str(pair), str(options["labelled.label"]))
    assert len(read_examples(str(options["labelled.test"]), *columns)) > 200
