"""Models by their names on the Hugging Face hub: from a cache in the real layout, and from a server that answers so."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from engine.errors import UserError
from engine.hub import HubModel, cached_folder, fetch, hub_model, local_folder, missing_part, wanted_files
from engine.train.start import begun_with
from launch.configure.options import parse
from tests.conftest import ROOT
from tests.train.runs import command as launcher
from tests.train.runs import environment

COMMIT, OTHER = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "vocab.txt": b"[PAD]\n",
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled weights",
    "tf_model.h5": b"another framework's",
    "onnx/model.onnx": b"another format",
}


def save_in_cache(cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """A model's files as huggingface_hub keeps them: blobs, links of a commit, and the branch main."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for file, content in files.items():
        if "/" in file:
            continue
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Hub(http.server.ThreadingHTTPServer):
    """A hub of the model org/name: `files` at COMMIT, which is its main; notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = dict(FILES)
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
    """What huggingface.co answers about a model without Xet: https://huggingface.co/docs/hub/api."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        files = self.server.files
        if path.startswith("/org/name/resolve/"):
            revision, _, file = path.removeprefix("/org/name/resolve/").partition("/")
            assert revision == COMMIT
            self.send(200, files[file], {"ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"'})
        elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            listed = [{"rfilename": file} for file in files]
            self.send(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": listed}).encode())
        elif path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            self.send(200, json.dumps(tree).encode())
        else:
            code = "RevisionNotFound" if path.startswith("/api/models/org/name/") else "RepoNotFound"
            self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not there"})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, offline, in an empty working folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which may be asked."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("bert-base-uncased", HubModel("bert-base-uncased")),
        ("google-bert/bert-base-uncased", HubModel("google-bert/bert-base-uncased")),
        ("org/name@refs/pr/1", HubModel("org/name", "refs/pr/1")),
        (f"org/na_me.2@{COMMIT}", HubModel("org/na_me.2", COMMIT)),
    ],
)
def test_a_name_of_the_hub_is_known(text: str, model: HubModel) -> None:
    assert hub_model(text) == model
    assert str(model) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "..", "./no/such", "../no", "/no/such", "~/bert", "a/b/c", "org/", "org/na me", "org/na\nme"),
        *("org/näme", "a--b", "org/a..b", "C:\\bert", "org/name.", "vocab.txt", "bert/vocab.txt", "my-model.bin"),
        *("x" * 97, "@main"),
    ],
)
def test_what_cannot_be_a_name_is_a_path(text: str) -> None:
    assert hub_model(text) is None
    assert local_folder(text) == Path(text)


@pytest.mark.parametrize("revision", ["", " ", "../main", "/main", "main/", "a b", "-x", "v1@v2", "mäin"])
def test_a_revision_that_cannot_be_one_is_named(revision: str) -> None:
    with pytest.raises(UserError, match=r"^tokenizer: 'org/name@.*give a branch, tag or commit of org/name$"):
        hub_model(f"org/name@{revision}", "tokenizer")


def test_a_folder_that_exists_wins(cache: Path) -> None:
    save_in_cache(cache, "org/name", FILES)
    assert hub_model("org/name") is not None
    Path("org/name").mkdir(parents=True)
    assert hub_model("org/name") is None
    assert local_folder("org/name") == Path("org/name")


def test_only_files_that_are_read_are_wanted() -> None:
    plain = ["config.json", "vocab.txt", "tokenizer_config.json"]
    assert wanted_files(FILES, weights=True) == [*plain, "model.safetensors"]
    assert wanted_files(FILES, weights=False) == plain
    assert wanted_files({"pytorch_model.bin", "training_args.bin"}, weights=True) == ["pytorch_model.bin"]
    shards = {f"model-{index:05}-of-00002.safetensors" for index in (1, 2)}
    index = "model.safetensors.index.json"
    assert wanted_files(shards | {index, "model.fp16.safetensors"}, weights=True) == [index, *sorted(shards)]
    assert missing_part({"config.json", "vocab.txt"}, weights=True) == "model.safetensors or pytorch_model.bin"
    assert missing_part({"config.json", "model.safetensors"}, weights=True) == "tokenizer.json or vocab.txt"
    assert missing_part({"vocab.txt", "model.safetensors"}, weights=True) == "config.json"
    assert missing_part({"vocab.txt"}, weights=False) is None


def test_a_cached_model_is_taken_offline(cache: Path) -> None:
    snapshot = save_in_cache(cache, "org/name", FILES)
    assert fetch(HubModel("org/name")) == snapshot
    assert fetch(HubModel("org/name", COMMIT)) == snapshot
    assert HubModel("org/name").at(snapshot) == HubModel("org/name", COMMIT)
    assert local_folder(f"org/name@{COMMIT}") == snapshot


@pytest.mark.parametrize("lost", ["config.json", "vocab.txt", "model.safetensors", "blob"])
def test_a_part_of_a_model_is_not_taken_for_it(cache: Path, lost: str) -> None:
    files = {name: content for name, content in FILES.items() if name not in (lost, "pytorch_model.bin")}
    snapshot = save_in_cache(cache, "org/name", files)
    if lost == "blob":
        (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(UserError, match="does not hold the whole model"):
        fetch(HubModel("org/name"))


def test_a_shard_that_is_missing_is_noticed(cache: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "vocab.txt": b"", "model.safetensors.index.json": index}
    files["model-1-of-2.safetensors"] = b"one"
    save_in_cache(cache, "org/name", files)
    with pytest.raises(UserError, match="does not hold the whole model"):
        fetch(HubModel("org/name"))
    save_in_cache(cache, "org/whole", files | {"model-2-of-2.safetensors": b"two"})
    assert fetch(HubModel("org/whole")).name == COMMIT


def test_what_is_not_there_offline_is_told_with_the_remedy(cache: Path) -> None:
    with pytest.raises(UserError) as raised:
        fetch(HubModel("org/name", "v2"), "tokenizer")
    assert str(raised.value) == (
        f"tokenizer: 'org/name@v2' is no such folder here, {cache} does not hold the whole model, and HF_HUB_OFFLINE "
        "forbids to ask the hub; where there is network run hf download org/name --revision v2 --local-dir name, copy "
        "that folder here and give its path"
    )


def test_a_download_brings_what_is_read_and_asks_no_second_time(hub: Hub) -> None:
    folder = fetch(HubModel("org/name"))
    wanted = {"config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in wanted}
    assert folder.name == COMMIT
    assert cached_folder(HubModel("org/name")) == folder
    hub.asked.clear()
    assert fetch(HubModel("org/name", COMMIT)) == folder
    assert hub.asked == []


def test_a_tokenizer_is_downloaded_without_the_weights(hub: Hub) -> None:
    folder = fetch(HubModel("org/name"), "tokenizer", weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "vocab.txt", "tokenizer_config.json"}
    assert (fetch(HubModel("org/name")) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (HubModel("org/nmae"), "'org/nmae' is no such folder here, nor a model at http"),
        (HubModel("org/name", "v9"), "'org/name@v9' names a revision that http"),
    ],
)
def test_the_hub_knows_no_such_model(hub: Hub, model: HubModel, said: str) -> None:
    with pytest.raises(UserError, match=f"^model.init_from: {said}"):
        fetch(model)


def test_a_model_without_weights_is_refused(hub: Hub) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        del hub.files[name]
    with pytest.raises(UserError, match=r"'org/name' has no model\.safetensors or pytorch_model.bin on the hub"):
        fetch(HubModel("org/name"))


def test_a_hub_that_does_not_answer_leaves_the_cache(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 did not give it \(.*refused.*; where there is network"):
        fetch(HubModel("org/name"))
    snapshot = save_in_cache(cache, "org/name", FILES)
    assert fetch(HubModel("org/name")) == snapshot
    assert f"taken from the cache: org/name@{COMMIT}" in capsys.readouterr().out


def test_a_resume_takes_the_commit_that_its_run_began_with() -> None:
    begun = {"model": {"init_from": f"org/name@{COMMIT}"}}
    assert begun_with(begun, HubModel("org/name")) == HubModel("org/name", COMMIT)
    assert begun_with(begun, HubModel("org/other")) == HubModel("org/other")
    for before in (None, "some/folder", "org/name"):
        assert begun_with({"model": {"init_from": before}}, HubModel("org/name")) == HubModel("org/name")


def test_dimensions_beside_a_name_are_compared_with_the_cache_or_refused(cache: Path) -> None:
    options = ["--task=sequence_classification", "--labelled.train=x", "--model.init_from=org/name"]
    with pytest.raises(UserError, match=r"model\.layers: 3 has no effect: model\.init_from 'org/name' has its own"):
        parse([*options, "--model.layers=3"])
    dimensions = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    shape = dict.fromkeys([*dimensions, "max_position_embeddings"], 3)
    save_in_cache(cache, "org/name", {"config.json": json.dumps(shape).encode()})
    assert parse([*options, "--model.layers=3"]).model.init_from == "org/name"
    with pytest.raises(UserError, match=r"model\.layers: 4 has no effect: model\.init_from 'org/name' has layers 3"):
        parse([*options, "--model.layers=4"])


def train(tmp_path: Path, *options: str, output: str = "run", ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """A run of fine-tuning as a user starts it, offline, with the test's cache."""
    launched = [sys.executable] if ranks == 1 else launcher("torchrun", ranks)
    command = [*launched, str(ROOT / "launch" / "train.py"), "--task=sequence_classification"]
    command += [f"--labelled.train={tmp_path / 'train.csv'}", "--labelled.max_length=16", "--train.global_batch=4"]
    command += [f"--output={tmp_path / output}", "--data.workers=0", *options]
    env = environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env = {name: value for name, value in env.items() if name != "HF_HUB_CACHE"}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_starts_from_a_name_and_goes_on_from_its_commit(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes))
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    files = {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()}
    cache = tmp_path / "home" / "hub"
    save_in_cache(cache, "org/name", files)
    lines = "".join(f"{word} film,{word}\n" for word in ("good", "bad") * 10)
    (tmp_path / "train.csv").write_text("text,label\n" + lines)
    options = ["--labelled.text=text", "--labelled.label=label", "--model.init_from=org/name"]

    done = train(tmp_path, *options, "--train.steps=1", ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"weights of org/name@{COMMIT}: taken: embeddings" in done.stdout
    assert f"init_from: org/name@{COMMIT}" in (tmp_path / "run" / "config.yaml").read_text()

    # main moves on to other weights, and the run does not
    save_in_cache(cache, "org/name", files | {"model.safetensors": b"no weights at all"}, OTHER)
    done = train(tmp_path, *options, "--train.steps=2", "--resume=auto")
    assert done.returncode == 0, done.stderr
    assert "resum" in done.stdout

    done = train(tmp_path, *options[:2], "--model.init_from=org/nmae", output="other")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: model.init_from: 'org/nmae' is no such folder here, ")
