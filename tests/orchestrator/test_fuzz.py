"""Hostile files: whatever bytes a reader is given, it answers with a line for people or the value.

Every reader gets a few hundred inputs, always the same; MOESAIC_FUZZ=10000 draws so many new ones:

    MOESAIC_FUZZ=10000 pytest tests/orchestrator/test_fuzz.py --timeout 0

The memory that a reader takes is limited in ``test_..._memory``: there the files are those that
would fill it.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moesaic.kernels import dense, lowrank
from moesaic.methods.base import Event
from moesaic.orchestrator import objects
from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.embeddings import read_pooling
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.fleet import read_cluster
from moesaic.orchestrator.listing import read_run
from moesaic.orchestrator.pieces import piece_metadata, read_piece, write_cut, write_piece
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.remote_model import open_checkpoint
from moesaic.orchestrator.run_folder import changed_lines
from moesaic.orchestrator.shared import CachePlace, fetched, make_store, write_shared
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.stored_model import model_folder, write_stored
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.study import Study, Told, facts
from moesaic.orchestrator.study_journal import check_journal
from moesaic.orchestrator.texts import Source, documents
from moesaic.search.knobs import Knob
from tests.orchestrator.projects import make_recipe
from tests.orchestrator.remote import MANY, Faulty, forget
from tests.orchestrator.tiny import save_tiny

_MANY = int(os.environ.get("MOESAIC_FUZZ", "0"))
settings.register_profile(
    "fuzz",
    max_examples=_MANY or 200,
    derandomize=not _MANY,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings(settings.get_profile("fuzz"))
KEY = "ab" * 20

# Values that JSON has, absurd ones among them.
numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**300, 1e308, -0.0, 0.5]),
    st.sampled_from([float("nan"), float("inf")]),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(max_size=8),
    st.sampled_from(
        ["F32", "BF16", "float32", "../../etc/passwd", "/dev/zero", "\x1b[31m\n", "\0"]
    ),
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "of", "ranks", "units", "a\nb"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
Document = Any


def _places(document: Document, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a document."""
    yield path
    inner: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        inner = list(document.items())
    elif isinstance(document, list):
        inner = list(enumerate(document))
    for key, value in inner:
        yield from _places(value, (*path, key))


def _replaced(document: Document, path: tuple[Any, ...], value: Any) -> Document:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = _replaced(document[path[0]], path[1:], value)
    return copy


@st.composite
def altered(draw: st.DrawFn, document: Document) -> Document:
    """The document with one to three of its values replaced, taken out, or with one more."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(document))))
        document = _replaced(document, path, draw(values))
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut off, some of them changed, or something put between."""
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        put = draw(st.binary(max_size=9) | st.sampled_from([b"[" * 1500, b'{"a":' * 999, b"\xff"]))
        content = content[:at] + put + content[at + draw(st.integers(0, 4)) :]
    return content


def texts(document: Document) -> st.SearchStrategy[bytes]:
    """JSON that was altered or damaged."""
    plain = json.dumps(document).encode()
    return st.one_of(altered(document).map(lambda d: json.dumps(d).encode()), damaged(plain))


def tells(read: Callable[[], Any]) -> Any:
    """What ``read`` gives; None where it tells what is wrong in lines that people can read."""
    try:
        return read()
    except (UserError, RunError) as error:
        message = str(error)
        assert message and len(message) < 40_000
        for line in message.splitlines():
            assert len(line) < 2000, line
            assert all(c.isprintable() for c in line), repr(line)
        message.encode()  # no halves of surrogate pairs, which no terminal takes
        return None


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(raw: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw + data


def weights(header: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """Safetensors files whose header or bytes were altered."""
    whole = with_header(json.dumps(header).encode(), data)
    lengths = st.sampled_from([0, 1, 2**20, 10**8, 2**63, 2**64 - 1])
    return st.one_of(
        texts(header).map(lambda raw: with_header(raw, data)),
        damaged(whole),
        lengths.map(lambda n: struct.pack("<Q", n) + whole[8:]),
    )


# Model folders.

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "hidden_size": 8, "quantization_config": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, folder / "x.safetensors")
    save_file({"c": torch.ones(5).bfloat16()}, folder / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@given(data=st.data())
@FUZZ
def test_a_checkpoint_is_read_or_refused(model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", INDEX, "x.safetensors"]))
    file = model / name
    kept = file.read_bytes()
    if name.endswith(".json"):
        document = json.loads(kept)
        if name == INDEX:
            shard = data.draw(
                st.text(max_size=9).map(lambda text: f"{text}.safetensors")
                | st.sampled_from(["../x.safetensors", "/x.safetensors", "./x.safetensors", "x"])
            )
            document["weight_map"]["a"] = shard
        content = data.draw(texts(document))
    else:
        content = data.draw(weights(*header_of(file)))
    file.write_bytes(content)
    try:
        opened = tells(lambda: Checkpoint(model))
        for tensor in opened.names() if opened is not None else ():
            assert opened.read(tensor).nbytes == opened.nbytes(tensor) <= 100
            assert opened.entries()[tensor].file.parent.resolve() == model.resolve()
    finally:
        file.write_bytes(kept)


@pytest.fixture(scope="module", params=["llama", "stablelm", "deepseek_v2", "bert"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("small"), request.param)


# A model takes some hundredths of a second where everything fits.
@given(data=st.data())
@settings(FUZZ, max_examples=_MANY or 25)
def test_a_configuration_is_built_or_refused(small: Path, data: st.DataObject) -> None:
    file = small / "config.json"
    kept = file.read_bytes()
    document = json.loads(kept)
    key = data.draw(st.sampled_from([k for k, v in document.items() if type(v) in (int, float)]))
    number = data.draw(numbers | st.sampled_from([10**5, 10**7, 10**8]))
    file.write_text(json.dumps(data.draw(st.just({**document, key: number}) | altered(document))))
    try:
        found = tells(lambda: StreamedModel(Checkpoint(small)))
        assert found is None or found.blocks <= document["num_hidden_layers"]
    finally:
        file.write_bytes(kept)


MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]


@given(data=st.data())
@FUZZ
def test_pooling_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "pooling"
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    pooling = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_bytes(data.draw(texts(MODULES)))
    (folder / "1_Pooling/config.json").write_bytes(data.draw(texts(pooling)))
    assert tells(lambda: read_pooling(folder)) in (None, "mean", "first")


# Recipes.


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("recipe"), "builtin:demo")


tags = st.sampled_from(
    [
        "!!python/object/apply:os.system [touch /tmp/moesaic-was-here]",
        "!!python/name:os.system",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!!timestamp 2001-99-99",
        "&a [*a, *a]",
        "{<<: {bytes: 1}}",
        "0x" + "f" * 5000,
        "1" + ":59" * 2000,
        "9" * 4000,
        ".inf",
        "-.nan",
        "[" * 300 + "]" * 300,
        "x" * 9_000,
        "? [a, b]\n: c",
        '"\\uD800"',
    ]
)


# A recipe takes a hundredth of a second, twice where it is right.
@given(data=st.data())
@settings(FUZZ, max_examples=_MANY or 120)
def test_a_recipe_is_read_or_refused(recipe_file: Path, data: st.DataObject) -> None:
    plain = recipe_file.read_text()
    odd = recipe_file.with_name("odd.yaml")
    how = data.draw(st.sampled_from(["value", "damage", "tag"]))
    if how == "value":
        content = yaml.safe_dump(
            data.draw(altered(yaml.safe_load(plain))), sort_keys=False
        ).encode()
    elif how == "damage":
        content = data.draw(damaged(plain.encode()))
    else:
        lines = plain.splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        lines[at] = f"{key}: {data.draw(tags)}"
        content = "\n".join(lines).encode()
    odd.write_bytes(content)
    found = tells(lambda: load_recipe(odd))
    assert not Path("/tmp/moesaic-was-here").exists()
    if found is not None:
        assert isinstance(found, Recipe)
        odd.write_text(found.to_yaml(), encoding="utf-8")
        assert load_recipe(odd) == found


CLUSTER = {
    "store": "40 GB",
    "nodes": [{"count": 2, "gpus": 8, "gpu": "H100", "cpus": 64}, {"cpus": 8, "memory": "2 TB"}],
}


@given(data=st.data())
@settings(FUZZ, max_examples=_MANY or 80)
def test_a_cluster_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "cluster.yaml"
    plain = yaml.safe_dump(CLUSTER)
    tagged = tags.map(lambda tag: plain.replace("H100", tag).encode())
    file.write_bytes(data.draw(texts(CLUSTER) | damaged(plain.encode()) | tagged))
    found = tells(lambda: read_cluster(str(file)))
    assert not Path("/tmp/moesaic-was-here").exists()
    if found is not None:
        tells(lambda: found.places(Compute()))
        assert len(found.networks()) <= 10**5


@given(data=st.data())
@settings(FUZZ, max_examples=_MANY or 80)
def test_what_a_run_was_made_from_is_compared_or_not_known(
    recipe_file: Path, data: st.DataObject
) -> None:
    recipe = load_recipe(recipe_file)
    folder = recipe_file.parent / "run"
    folder.mkdir(exist_ok=True)
    plain = recipe.to_yaml()
    document = altered(yaml.safe_load(plain)).map(lambda d: yaml.safe_dump(d).encode())
    tagged = tags.map(lambda tag: f"{plain}\nmore: {tag}\n".encode())
    (folder / "recipe.yaml").write_bytes(data.draw(document | damaged(plain.encode()) | tagged))
    lines = changed_lines(folder, recipe)
    assert not Path("/tmp/moesaic-was-here").exists()
    assert len(lines) <= 15 and all(line.isprintable() and len(line) < 800 for line in lines)


def laughs(depth: int) -> str:
    """Ten to the power of ``depth`` values in a few lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join([*lines, f"candidates: *a{depth - 1}"])


def test_names_of_a_run_s_recipe_stay_short_however_often_they_are_repeated(
    recipe_file: Path, tmp_path: Path
) -> None:
    """With 300,000 characters in front of each, 10,000 values would be gigabytes."""
    key, values = "k" * 300_000, ", ".join("x" * 10_000)
    (tmp_path / "recipe.yaml").write_text(f"{'a' * 900}: {{b: {{? {key}\n: [{values}]}}}}")
    lines = changed_lines(tmp_path, load_recipe(recipe_file))
    assert len(lines) == 15 and max(map(len, lines)) < 500


def test_aliases_that_amount_to_too_much_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "laughs.yaml"
    file.write_text(laughs(9))
    with pytest.raises(UserError, match=r"laughs\.yaml: not valid YAML: line \d+: more than 100,0"):
        load_recipe(file)
    file.write_text("a: " + "x" * (2 << 20))
    with pytest.raises(
        UserError, match=r"laughs\.yaml: cannot be read: has .* limit 1048576 bytes"
    ):
        load_recipe(file)
    file.write_text("model: &a [*a]")
    with pytest.raises(UserError, match="line 1: an alias of what it stands in"):
        load_recipe(file)


# Entries of a store. Whoever can write them can also seal them.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    factors = lowrank.pack(dense.pack(torch.ones(6, 2)), dense.pack(torch.ones(2, 8)))
    members = {"weight": factors, "other": dense.pack(torch.ones(3, 4))}
    store.put("pieces", KEY, lambda path: write_piece(path, members, {"unit": "u"}), {"a": 1})
    cut = "cd" * 20
    store.put("pieces", cut, lambda p: write_cut(p, KEY, {"weight": 1}, {"unit": "u"}), {"a": 1})
    return store


@given(data=st.data())
@FUZZ
def test_a_piece_is_read_or_refused(store: Store, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([KEY, "cd" * 20]))
    file = store.path("pieces", key)
    kept = file.read_bytes()
    header, tail = header_of(file)
    if data.draw(st.booleans()):  # texts within the text
        metadata = header["__metadata__"]
        name = data.draw(st.sampled_from(sorted(metadata)))
        metadata[name] = data.draw(texts(json.loads(metadata[name]))).decode("utf-8", "replace")
        content = with_header(json.dumps(header).encode(), tail)
    else:
        content = data.draw(weights(header, tail))
    file.write_bytes(content)
    try:
        found = tells(lambda: read_piece(file))
        for member in (found or {}).values():
            assert member.dense().shape == member.shape
        metadata = tells(lambda: piece_metadata(file))
        assert metadata is None or isinstance(metadata, dict)
    finally:
        file.write_bytes(kept)


@given(data=st.data())
@FUZZ
def test_a_seal_is_believed_or_the_entry_is_missing(store: Store, data: st.DataObject) -> None:
    value = {"scores": [1.0, None], "name": "x"}
    entry = store.put_json("scores", KEY, value)
    seal = entry.path.with_name(f"{KEY}.seal.json")
    sealed = json.loads(seal.read_text())
    seal.write_bytes(data.draw(texts(sealed)))
    found = store.get("scores", KEY, "json")
    assert found is None or (found.size == entry.size and isinstance(found.metadata, dict))
    assert entry.path.exists() == (found is not None)

    told = {"unit": "u", "bytes": {"w": 1}, "seconds": 0.5, "events": [asdict(Event("a", "b"))]}
    piece = "ab" + "2" * 38
    entry = store.put("pieces", piece, lambda path: path.write_bytes(b"x") and None, told)
    seal = entry.path.with_name(f"{piece}.seal.json")
    sealed = json.loads(seal.read_text())
    sealed["metadata"] = data.draw(altered(told))
    seal.write_text(json.dumps(sealed))
    found = store.get("pieces", piece)
    if found is not None:
        assert all(n >= 0 for n in found.metadata["bytes"].values())
        assert math.isfinite(float(found.metadata["seconds"]))
        events = [Event(**event) for event in found.metadata["events"]]
        assert all(isinstance(event.kind, str) for event in events)

    raw = data.draw(texts(value))
    store.put("scores", KEY, lambda path: path.write_bytes(raw) and None, suffix="json")
    tells(lambda: store.get_json("scores", KEY))


# A model in a store at a URL.


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a model of one shard."""
    Faulty.store.clear()
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "PAUSE_SECONDS", 0.0)
        patch.setattr(Faulty, "faults", staticmethod(lambda operation, path: 0))
        place = CachePlace(tmp_path_factory.mktemp("cache"), MANY)
        store = make_store("faulty://bucket/fuzz", place)
        folder = model_folder(store.root, KEY)
        index = {"weight_map": {"a": "x.safetensors"}}
        write_stored(folder, {"model_type": "llama"}, index, {"x.safetensors": KEY})
        store.put("sliced", KEY, lambda path: save_file({"a": torch.ones(3)}, path))
        yield folder
    release_pins()


@given(data=st.data())
@settings(FUZZ, max_examples=_MANY or 120)
def test_entries_of_a_sliced_model_are_followed_or_refused(
    sliced: Path, data: st.DataObject
) -> None:
    root = sliced.parents[1]
    name = data.draw(st.sampled_from(["entries.json", "entries.json", INDEX]))
    plain = {"entries.json": {"x.safetensors": KEY}, INDEX: {"weight_map": {"a": "x.safetensors"}}}
    content = data.draw(texts(plain[name]))
    before = {path for path in root.parent.rglob("*") if path.name != ".lock"}
    kept = fetched(sliced / name).read_bytes()
    write_shared(sliced / name, lambda path: path.write_bytes(content) and None)
    try:
        found = tells(lambda: open_checkpoint(sliced))
        if found is not None:
            assert tells(lambda: found.read("a")) is not None or "a" not in found
            assert all(file.is_relative_to(root) for file in found.files)
    finally:
        write_shared(sliced / name, lambda path: path.write_bytes(kept) and None)
    assert {path for path in root.parent.rglob("*") if path.name != ".lock"} <= before


# What a run leaves.

PLAN = {
    "units": {"layers.0.q": [{"method": "rtn", "options": {"bits": 4, "group_size": 16}}]},
    "bytes": 100,
}
FIGURES = {"bytes": 100, "bits_per_weight": 4.0, "perplexity": 9.0, "kl": 0.1, "accuracy": 0.5}
SCORES = {"dense": FIGURES, "plan": FIGURES}


@given(data=st.data())
@FUZZ
def test_a_run_is_shown_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_bytes(data.draw(texts(PLAN)))
    (folder / "scores.json").write_bytes(data.draw(texts(SCORES)))
    found = tells(lambda: read_run(folder))
    assert found is None or set(found) == {"scores", "plan", "choices"}


@given(data=st.data())
@FUZZ
def test_rows_of_text_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    row = {"text": "some words", "id": 3}
    file.write_bytes(b"\n".join(data.draw(st.lists(texts(row), min_size=1, max_size=3))))
    found = tells(lambda: list(documents(Source(file=str(file)))))
    assert found is None or all(isinstance(text, str) for text in found)


_KNOBS = [Knob("slope", "", 0.0, -1.0, 1.0)]
_MADE_OF = {"model": "a"}


def opened_study(journal: Path) -> Study:
    starts = {"as predicted": {}}
    return Study(journal, "small", _KNOBS, ["kl"], "random", 3, _MADE_OF, starts)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Lines of the journal of a study with a trial that is told and one that is not."""
    file = tmp_path_factory.mktemp("study") / "journal.log"
    with opened_study(file) as study:
        study.tell(study.ask(), {"kl": 0.5})
        study.ask()
    return file.read_bytes().splitlines()


@given(data=st.data())
@FUZZ
def test_a_journal_is_gone_on_with_or_refused(
    tmp_path_factory: pytest.TempPathFactory, journal: list[bytes], data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "journal" / "journal.log"
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir()
    lines = list(journal)
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = data.draw(texts(json.loads(lines[at])))
    file.write_bytes(b"\n".join(lines) + b"\n")

    def read() -> list[Told]:
        with opened_study(file) as study:
            return study.told()

    content = file.read_bytes()
    tells(lambda: check_journal(file, "small", facts(_MADE_OF, _KNOBS, ["kl"]), True))
    assert file.read_bytes() == content
    found = tells(read)
    assert found is None or all(isinstance(told, Told) for told in found)


# Memory. A child process may take so much more than it has after its imports.

_ALLOWED_BYTES = 1_500_000_000
_CHILD = """
import resource, sys
from pathlib import Path
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.fleet import read_cluster
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run_folder import changed_lines
from moesaic.orchestrator.texts import Source, documents
def changes(folder):
    (line,) = changed_lines(folder, load_recipe(folder.parent / "recipe.yaml"))
    raise UserError(line)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
READ = {
    "checkpoint": lambda path: Checkpoint(path),
    "model": lambda path: StreamedModel(Checkpoint(path)),
    "piece": read_piece,
    "recipe": load_recipe,
    "cluster": lambda path: read_cluster(str(path)),
    "changes": changes,
    "rows": lambda path: list(documents(Source(file=str(path)))),
}
for line in sys.stdin.read().splitlines():
    kind, path = line.split(" ", 1)
    try:
        READ[kind](Path(path))
        print("read")
    except (UserError, RunError) as error:
        print("told", str(error)[-200:])
"""


def test_files_that_would_fill_the_memory_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    import gzip

    lists = b'{"a":[' + b"[]," * 6_000_000 + b"[]]}"
    asked: list[tuple[str, Path]] = []
    for name, raw in (("lists", lists), ("deep", b"[" * 8_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(with_header(raw, b""))
        asked += [("checkpoint", folder), ("piece", folder / "model.safetensors")]
    huge = tmp_path / "huge"
    huge.mkdir()
    (huge / "config.json").write_bytes(b"[" + b" " * (70 << 20))
    asked.append(("checkpoint", huge))
    many = {"num_hidden_layers": 10**8, "num_labels": 10**8, "head_dim": 10**9}
    for key, number in many.items():
        folder = save_tiny(tmp_path / key, "llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: number}))
        asked.append(("model", folder))
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as stream:  # claims a header of half its 190 MB, all of it zeros
        stream.write(struct.pack("<Q", 95_000_000))
        stream.truncate(190_000_000)
    asked.append(("piece", sparse))
    shape = {"weight": {"format": "lowrank", "shape": [2**20, 2**20], "dtype": "float32"}}
    shape["weight"]["params"] = {"rank": 2**18}
    texts = {"members": json.dumps(shape), "metadata": "{}"}
    (tmp_path / "piece.safetensors").write_bytes(
        with_header(json.dumps({"__metadata__": texts}).encode(), b"")
    )
    asked.append(("piece", tmp_path / "piece.safetensors"))
    (tmp_path / "laughs.yaml").write_text(laughs(12))
    asked += [(kind, tmp_path / "laughs.yaml") for kind in ("recipe", "cluster")]
    run = recipe_file.parent / "laughs"
    run.mkdir()
    (run / "recipe.yaml").write_text(laughs(12))
    asked.append(("changes", run))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as packed:
        for _ in range(70):
            packed.write(b" " * (1 << 20))
    asked.append(("rows", tmp_path / "rows.jsonl.gz"))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(_ALLOWED_BYTES)],
        input="\n".join(f"{kind} {path}" for kind, path in asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(asked)
    assert all(answer.startswith("told ") for answer in answers), answers


def test_a_store_piece_cannot_name_files_elsewhere(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "pieces" / "aa"
    elsewhere.mkdir(parents=True)
    shutil.copy(store.path("pieces", KEY), elsewhere / "whole.safetensors")
    inside = store.path("pieces", "ef" * 20)
    inside.parent.mkdir(exist_ok=True)
    for of in (f"../../{os.path.relpath(elsewhere, store.root)}/whole", str(elsewhere / "whole")):
        write_cut(inside, of, {}, {})
        with pytest.raises(RunError, match="it is a cut of "):
            read_piece(inside)
    # A cut of itself must end.
    write_cut(inside, "ef" * 20, {}, {})
    with pytest.raises(RunError, match="is no piece of moesaic"):
        read_piece(inside)
