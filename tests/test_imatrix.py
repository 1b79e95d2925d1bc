"""Importance matrices: the files, merging them, and the command that collects one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import soundfile

from auricle.convert.hf import convert, plan_conversion
from auricle.convert.importance import (
    ColumnSums,
    ImportanceMatrix,
    merge,
    read_importance,
    read_matrix,
    write_matrix,
)
from auricle.convert.source import ConversionError
from auricle.engine import AuricleError, load
from auricle.engine.gguf import GGUFError, Typed, i32s, open_gguf, string, u32, u64
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.engine.graph import Graph
from auricle.engine.models.moss_audio import decoder_graph, encoder_graph
from auricle.kernels.formats import F32
from auricle.tools.cli.main import run
from auricle.tools.imatrix import collect_importance
from auricle.tools.sample import SampleShape, write_checkpoint
from sounds import JFK, synthetic

# Files.


def make_matrix(seed: int = 0, n_rows: int = 700, **sizes: int) -> ImportanceMatrix:
    """Random sums for weights of these numbers of columns (a `__` in a name is a dot)."""
    rng = np.random.default_rng(seed)
    names = {name.replace("__", "."): n for name, n in (sizes or {"b__weight": 5, "a__weight": 3}).items()}
    return ImportanceMatrix({name: ColumnSums(rng.random(n), n_rows) for name, n in names.items()}, (f"{seed}.wav",))


def test_round_trip(tmp_path: Path) -> None:
    matrix = make_matrix()
    size = write_matrix(tmp_path / "m.gguf", matrix)
    assert (tmp_path / "m.gguf").stat().st_size == size
    again = read_matrix(tmp_path / "m.gguf")
    assert again.datasets == ("0.wav",)
    assert again.sums.keys() == matrix.sums.keys()
    importance = read_importance(tmp_path / "m.gguf")
    for name, sums in matrix.sums.items():
        assert again.sums[name].n_rows == 700
        np.testing.assert_array_equal(again.sums[name].squares, sums.squares.astype(np.float32))
        assert importance[name].dtype == np.float32
        np.testing.assert_allclose(importance[name], sums.squares / 700, rtol=2e-7)


def test_the_gguf_package_reads_it_as_llama_cpp_lays_it_out(tmp_path: Path) -> None:
    matrix = make_matrix()
    write_matrix(tmp_path / "m.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = gguf.Keys.IMatrix
    assert reader.fields[gguf.Keys.General.TYPE].contents() == gguf.GGUFType.IMATRIX
    assert reader.fields[keys.DATASETS].contents() == ["0.wav"]
    for key, value in {keys.CHUNK_SIZE: 512, keys.CHUNK_COUNT: 2}.items():
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
        assert reader.fields[key].contents() == value
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == ["a.weight.in_sum2", "a.weight.counts", "b.weight.in_sum2", "b.weight.counts"]
    assert {t.tensor_type for t in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    for name, sums in matrix.sums.items():
        assert tensors[f"{name}.in_sum2"].shape.tolist() == [len(sums.squares)]
        np.testing.assert_array_equal(tensors[f"{name}.in_sum2"].data, sums.squares.astype(np.float32))
        assert tensors[f"{name}.counts"].data.tolist() == [700.0]


def write_foreign(path: Path, tensors: dict[str, np.ndarray], kind: str | None = "imatrix") -> Path:
    """A file as another program writes it, by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(squares: list, count: float = 4, shape: tuple[int, ...] = (1, -1)) -> dict[str, np.ndarray]:
    """One weight's tensors."""
    return {
        "w.weight.in_sum2": np.array(squares, np.float32).reshape(shape),
        "w.weight.counts": np.full((1, 1), count, np.float32),
    }


@pytest.mark.parametrize("shape", [(-1,), (1, -1)], ids=["1-d", "2-d"])
def test_files_of_other_tools(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Newer ones have the plain sums too."""
    tensors = pair([4, 0, 8], shape=shape) | {"w.weight.in_sum": np.full(3, -7, np.float32)}
    path = write_foreign(tmp_path / "llama.gguf", tensors)
    assert {name: v.tolist() for name, v in read_importance(path).items()} == {"w.weight": [1, 0, 2]}
    assert read_matrix(path).datasets == ("wiki.txt",)


@pytest.mark.parametrize(
    ("tensors", "kind", "complaint"),
    [
        (pair([1]), "model", "is a model; give it with -m; give the output of auricle imatrix"),
        (pair([1]), None, "is a model; give it with -m"),
        (pair([1]), "adapter", "is a LoRA adapter; give it with --lora beside a model"),
        ({"w.weight": np.ones(3, np.float32)}, "imatrix", "holds no sums"),
        ({"w.weight.counts": np.ones(1, np.float32)}, "imatrix", "w.weight.in_sum2 is missing"),
        ({"w.weight.in_sum2": np.ones(3, np.float32)}, "imatrix", "w.weight.counts is missing"),
        (pair([1, np.nan]), "imatrix", "w.weight: the sum of squares of column 1 is nan"),
        (pair([1, 1, np.inf]), "imatrix", "w.weight: the sum of squares of column 2 is inf"),
        (pair([-1, 1]), "imatrix", "w.weight: the sum of squares of column 0 is -1"),
        (pair([1], 0), "imatrix", "w.weight was seen 0 times"),
        (pair([1], np.nan), "imatrix", "w.weight was seen nan times"),
        (pair([1], np.inf), "imatrix", "w.weight was seen inf times"),
        (pair([1, 2, 3, 4], shape=(2, 2)), "imatrix", "w.weight is 2 matrices in one"),
        ({k: v.astype(np.float16) for k, v in pair([1]).items()}, "imatrix", "w.weight.in_sum2 is F16, not F32"),
    ],
)  # fmt: skip
def test_files_that_make_no_sense(tmp_path: Path, tensors: dict, kind: str | None, complaint: str) -> None:
    path = write_foreign(tmp_path / "bad.gguf", tensors, kind)
    with pytest.raises(ConversionError) as caught:
        read_importance(path)
    message = str(caught.value)
    assert complaint in message
    assert str(path) in message
    assert "\n" not in message


def test_the_files_of_crispasr(tmp_path: Path) -> None:
    """Sums under the weights' own names, counts in keys, no type."""
    sums = {"enc.blk.0.attn.q.weight": [4, 0, 8], "llm.lm_head.weight": [3, 9]}
    counts = {f"count.{name}": u64(4 - n) for n, name in enumerate(sums)}

    def write(tensors: dict[str, np.ndarray], metadata: dict[str, Typed]) -> Path:
        layout = plan_layout(metadata, [(name, x.shape, F32) for name, x in tensors.items()])
        with GGUFWriter(tmp_path / "crisp.gguf", layout) as writer:
            for name, x in tensors.items():
                writer.write(name, x)
        return tmp_path / "crisp.gguf"

    tensors = {name: np.array(x, np.float32) for name, x in sums.items()}
    found = read_matrix(write(tensors, counts))
    assert {name: (s.squares.tolist(), s.n_rows) for name, s in found.sums.items()} == {
        "enc.blk.0.attn.q.weight": ([4, 0, 8], 4),
        "llm.lm_head.weight": ([3, 9], 3),
    }
    assert found.datasets == ()
    bad = {name: typed for name, typed in counts.items() if "lm_head" in name}
    for value, complaint in ((u64(0), "it must be 1 or more"), (string("4"), "it must be a whole number")):
        with pytest.raises(AuricleError, match=complaint):
            read_matrix(write(tensors, counts | {next(iter(bad)): value}))
    with pytest.raises(ConversionError, match="is 2 rows of sums"):
        read_matrix(write({"llm.lm_head.weight": np.ones((2, 3), np.float32)}, bad))
    with pytest.raises(ConversionError, match="column 1 is -1"):
        read_matrix(write({"llm.lm_head.weight": np.array([1, -1], np.float32)}, bad))


@pytest.mark.parametrize("datasets", [string("a.txt"), u32(3), i32s([1, 2])], ids=["text", "number", "numbers"])
def test_datasets_that_are_no_names(tmp_path: Path, datasets: Typed) -> None:
    layout = plan_layout(
        {"general.type": string("imatrix"), "imatrix.datasets": datasets},
        [("w.weight.in_sum2", (1,), F32), ("w.weight.counts", (1,), F32)],
    )
    with GGUFWriter(tmp_path / "a.gguf", layout) as writer:
        for name in layout.tensors:
            writer.write(name, np.ones(1, np.float32))
    with pytest.raises(GGUFError, match=r"imatrix.datasets = .*: it must be a list of texts"):
        read_matrix(tmp_path / "a.gguf")


def test_the_old_files_of_llama_cpp_are_known(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii3f", 7, 3, 1, 2, 3)
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<i", 1) + entry)
    with pytest.raises(GGUFError, match=r"an importance matrix in llama.cpp's old format; make it one with llama-imat"):
        read_matrix(tmp_path / "imatrix.dat")


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot open"):
        read_importance(tmp_path / "no.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_sums_that_cannot_be_stored_are_not_written(tmp_path: Path, value: float) -> None:
    matrix = ImportanceMatrix({"w.weight": ColumnSums(np.array([1, value]), 1)})
    with pytest.raises(ConversionError, match=r"w\.weight: the sum of squares of column 1"):
        write_matrix(tmp_path / "m.gguf", matrix)
    with pytest.raises(ConversionError, match="no sums"):
        write_matrix(tmp_path / "m.gguf", ImportanceMatrix())
    assert list(tmp_path.iterdir()) == []


def test_merging() -> None:
    a, b = make_matrix(1, 10, x=4, y=2), make_matrix(2, 5, y=2, z=3)
    both = merge([a, b])
    assert both.datasets == ("1.wav", "2.wav")
    assert {name: s.n_rows for name, s in both.sums.items()} == {"x": 10, "y": 15, "z": 5}
    np.testing.assert_array_equal(both.sums["y"].squares, a.sums["y"].squares + b.sums["y"].squares)
    np.testing.assert_array_equal(both.sums["x"].squares, a.sums["x"].squares)
    assert a.sums["y"].n_rows == 10, "merging changes what it merges"
    with pytest.raises(ConversionError, match="y has 2 columns in one importance matrix and 7 in another"):
        merge([a, make_matrix(3, 5, y=7)])


# Collecting.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two short recordings."""
    folder = tmp_path_factory.mktemp("imatrix")
    shape = SampleShape(n_layer=2, enc_n_layer=3, taps=(0, 1), n_inject=2)
    write_checkpoint(folder / "checkpoint", shape)
    convert(plan_conversion(folder / "checkpoint", "q8_0"), folder / "model.gguf")
    for name, seconds in {"a": 5.1, "b": 2.3}.items():
        soundfile.write(folder / f"{name}.wav", synthetic(seconds, 16_000, seed=len(name)), 16_000)
    return folder


def collect(folder: Path, *clips: str, **options) -> ImportanceMatrix:
    with load(folder / "model.gguf") as model:
        return collect_importance(model, [str(folder / clip) for clip in clips], **options)


def test_every_matrix_of_the_graphs_is_in_it(folder: Path) -> None:
    matrix = collect(folder, "a.wav", max_new_tokens=3)
    with load(folder / "model.gguf") as model:
        graphs: list[Graph] = [
            encoder_graph(model.config, 1, 400, 50),
            decoder_graph(model.config, 1, 1, head="all", with_audio=True),
        ]
        want = {n.inputs[1].name: n.inputs[1].shape[1] for g in graphs for n in g.nodes if n.op == "linear"}
        n_prompt = len(model.build_prompt("Transcribe the audio.", model.listen(folder / "a.wav")).ids)
    assert {name: len(sums.squares) for name, sums in matrix.sums.items()} == want
    rows = {name: sums.n_rows for name, sums in matrix.sums.items()}
    n_audio = 50 + 14
    assert rows["enc.stem_proj.weight"] == rows["deepstack.1.down.weight"] == n_audio
    assert rows["llm.blk.0.attn.q.weight"] == rows["llm.blk.1.ffn.down.weight"] == n_prompt + 3
    assert rows["llm.lm_head.weight"] == 1 + 3


def test_a_run_over_two_clips_is_two_runs_merged(folder: Path, tmp_path: Path) -> None:
    apart = [collect(folder, clip, max_new_tokens=4) for clip in ("a.wav", "b.wav")]
    for n, matrix in enumerate(apart):
        write_matrix(tmp_path / f"{n}.gguf", matrix)
    write_matrix(tmp_path / "both.gguf", collect(folder, "a.wav", "b.wav", max_new_tokens=4))
    merged = merge(read_matrix(tmp_path / f"{n}.gguf") for n in range(2))
    both = read_matrix(tmp_path / "both.gguf")
    assert merged.datasets == both.datasets == (str(folder / "a.wav"), str(folder / "b.wav"))
    assert merged.sums.keys() == both.sums.keys()
    for name, sums in both.sums.items():
        assert merged.sums[name].n_rows == sums.n_rows
        np.testing.assert_allclose(merged.sums[name].squares, sums.squares, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("clips", "options", "complaint"),
    [
        (["a.wav", "no.wav"], {}, "no.wav"),
        (["a.wav"], {"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_nothing_is_run_before_all_clips_are_known_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clips: list[str], options: dict, complaint: str
) -> None:
    monkeypatch.setattr("auricle.tools.imatrix.run_request", lambda *_: pytest.fail("ran"))
    with pytest.raises(AuricleError, match=complaint):
        collect(folder, *clips, **options)


# The command.


def auricle(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "auricle.tools", "imatrix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_collects_and_merges(folder: Path, tmp_path: Path) -> None:
    options = ("-m", folder / "model.gguf", "--max-new-tokens", 2)
    done = auricle(JFK, *options, "-o", tmp_path / "jfk.gguf")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if "kernel" not in line]) == 1
    first = read_matrix(tmp_path / "jfk.gguf")
    assert first.datasets == (str(JFK),)
    assert first.sums["enc.blk.0.attn.k.weight"].n_rows == 138

    more = ("--merge", tmp_path / "jfk.gguf", "--prompt", "What do you hear?", "--json")
    done = auricle(folder / "b.wav", *options, "-o", tmp_path / "jfk.gguf", *more)
    assert done.returncode == 0, done.stderr
    second = read_matrix(tmp_path / "jfk.gguf")
    assert second.datasets == (str(JFK), str(folder / "b.wav"))
    assert second.sums["enc.blk.0.attn.k.weight"].n_rows == 138 + 29
    facts = json.loads(done.stdout)
    assert facts["rows"] == {name: sums.n_rows for name, sums in second.sums.items()}
    assert facts["bytes"] == (tmp_path / "jfk.gguf").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["jfk.gguf"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the command in this process: gives its status, stdout and stderr."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["auricle", "imatrix", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run()
        return ended.value.code, *capsys.readouterr()

    return run_here


def other_matrix(folder: Path, tmp_path: Path) -> list:
    write_matrix(tmp_path / "other", make_matrix(adapter__up__weight=64))
    return [folder / "a.wav", "--merge", tmp_path / "other"]


def strange_matrix(folder: Path, tmp_path: Path) -> list:
    write_matrix(tmp_path / "other", make_matrix(blk__0__attn_q__weight=64))
    return [folder / "a.wav", "--merge", tmp_path / "other"]


WRONG: dict[str, tuple[Callable[[Path, Path], list], int, str]] = {
    "no model": (lambda f, _: [f / "a.wav", "-m", f / "no.gguf"], 3, "no.gguf"),
    "no audio": (lambda f, _: [f / "a.wav", f / "no.wav"], 4, "no.wav"),
    "not audio": (lambda f, _: [f / "model.gguf", f / "a.wav"], 4, "model.gguf"),
    "too long": (lambda f, _: [f / "a.wav", "--ctx", 40], 5, "a.wav: the prompt is"),
    "negative": (lambda f, _: [f / "a.wav", "--max-new-tokens", -1], 2, "max_new_tokens is -1"),
    "no folder": (lambda f, t: [f / "a.wav", "-o", t / "no" / "out.gguf"], 8, "is not a folder"),
    "over its input": (lambda f, _: [f / "a.wav", "-o", f / "model.gguf"], 8, "is an input itself"),
    "merging a model": (
        lambda f, _: [f / "a.wav", "--merge", f / "model.gguf"],
        6,
        "model.gguf is a model; give it with -m",
    ),
    "merging what has no name of it": (strange_matrix, 6, "names no weight of this model (blk.0.attn_q.weight and 0"),
    "merging another model's": (other_matrix, 6, "adapter.up.weight has 64 columns, in the model 128"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_and_nothing_written(folder: Path, tmp_path: Path, here: Callable, case: str) -> None:
    make, status, complaint = WRONG[case]
    arguments = make(folder, tmp_path)
    before = (folder / "model.gguf").stat().st_mtime_ns
    for option, value in {"-m": folder / "model.gguf", "-o": tmp_path / "out.gguf"}.items():
        arguments += [] if option in arguments else [option, value]
    got, stdout, stderr = here(*arguments)
    assert (got, stdout) == (status, ""), stderr
    assert complaint in stderr
    assert stderr.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"other"}
    assert (folder / "model.gguf").stat().st_mtime_ns == before


def test_a_model_that_computes_nonsense(folder: Path, tmp_path: Path, here: Callable) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = bytearray((folder / "model.gguf").read_bytes())
    with open_gguf(folder / "model.gguf") as file:
        info = file.tensors["enc.blk.1.attn_norm.weight"]
    content[info.offset : info.offset + 4] = np.array([np.nan], "<f4").tobytes()
    damaged.write_bytes(content)
    status, _, stderr = here(folder / "a.wav", "-m", damaged, "-o", tmp_path / "out.gguf", "--max-new-tokens", 1)
    assert status == 3
    assert "damaged.gguf: tensor enc.blk.1.attn_norm.weight holds NaN" in stderr
    assert not (tmp_path / "out.gguf").exists()
