"""Models that are split into several files, as llama.cpp's tools do: any part stands for the whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from auricle.convert.checksums import hash_tensors
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.requantize import plan_requantization
from auricle.engine import load
from auricle.engine.gguf import GGUFError, Typed, ValueType, i32, i32s, open_gguf, string
from auricle.engine.gguf_write import GGUFWriter, plan_layout
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint

N_PARTS = 3


def u16(x: int) -> Typed:
    return Typed(ValueType.UINT16, x)


def part_path(folder: Path, n: int, count: int = N_PARTS, stem: str = "model") -> Path:
    return folder / f"{stem}-{n + 1:05d}-of-{count:05d}.gguf"


def write_part(path: Path, source: Path, names: list[str], keys: dict[str, Typed]) -> None:
    with open_gguf(source) as file:
        layout = plan_layout(keys, [(n, file.tensors[n].shape, file.tensors[n].format) for n in names])
        with GGUFWriter(path, layout) as writer:
            for name in names:
                writer.write(name, file.data(name))


def split(whole: Path, folder: Path, count: int = N_PARTS, **changed: Typed) -> list[Path]:
    """The parts of a file: all keys are in the first, and each says which it is."""
    with open_gguf(whole) as file:
        names, keys = list(file.tensors), dict(file.types)
    step = -(-len(names) // count)
    for n in range(count):
        own = {"split.no": u16(n), "split.count": u16(count), "split.tensors.count": i32(len(names))}
        own |= {key.replace("_", "."): value for key, value in changed.items()}
        write_part(part_path(folder, n, count), whole, names[n * step : (n + 1) * step], (keys if n == 0 else {}) | own)
    return [part_path(folder, n, count) for n in range(count)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    shape = SampleShape(n_layer=1, enc_n_layer=1, taps=(0,), n_inject=1)
    convert(plan_conversion(copy_checkpoint(folder / "checkpoint", shape), "f16"), folder / "whole.gguf")
    return folder / "whole.gguf"


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(whole, tmp_path_factory.mktemp("parts"))


def test_any_part_stands_for_the_whole(whole: Path, parts: list[Path]) -> None:
    with open_gguf(whole) as want:
        for path in parts:
            with open_gguf(path) as file:
                assert file.paths == tuple(parts)
                assert list(file.tensors) == list(want.tensors)
                assert {info.part for info in file.tensors.values()} == {0, 1, 2}
                for name, info in want.tensors.items():
                    assert (file.tensors[name].shape, file.tensors[name].format) == (info.shape, info.format)
                    assert np.array_equal(file.data(name), want.data(name)), name
                    file.forget(name)
                assert file.require("general.architecture", str) == "moss_audio"


def test_it_runs_and_answers_the_same(whole: Path, parts: list[Path]) -> None:
    sound = np.sin(np.arange(16_000, dtype=np.float32) / 20)
    answers = []
    for path in (whole, parts[1]):
        with load(path, n_ctx=200) as model:
            answers.append(model.generate("What?", sound, sample_rate=16_000, max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]


def test_quantising_a_part_is_quantising_the_whole(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    for name, path in (("whole", whole), ("part", parts[2])):
        convert(plan_requantization(path, "q8_0"), tmp_path / f"{name}.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "part.gguf").read_bytes()
    with open_gguf(tmp_path / "part.gguf") as file:
        assert not [key for key in file.metadata if key.startswith("split.")]


def test_no_part_is_written_over(parts: list[Path]) -> None:
    for path in parts:
        before = path.stat().st_mtime_ns
        with pytest.raises(Exception, match="is an input itself"):
            convert(plan_requantization(parts[0], "q8_0"), path)
        assert path.stat().st_mtime_ns == before


def test_checksums_cover_every_part(whole: Path, parts: list[Path]) -> None:
    want, found = hash_tensors(whole), hash_tensors(parts[1])
    assert {name: found[name] for name in want if not name.startswith("(")} == {
        name: digest for name, digest in want.items() if not name.startswith("(")
    }
    assert [name for name in found if name.startswith("(")] == [
        "(metadata)", "(metadata of part 2)", "(metadata of part 3)",
    ]  # fmt: skip


def test_a_file_that_was_joined_again_loads(whole: Path, tmp_path: Path) -> None:
    """llama.cpp's tool leaves a count of 0 behind."""
    with open_gguf(whole) as file:
        names, keys = list(file.tensors), dict(file.types)
    merged = tmp_path / "merged.gguf"
    write_part(merged, whole, names, keys | {"split.count": u16(0), "split.no": u16(0), "split.tensors.count": i32(3)})
    with load(merged, n_ctx=64) as model:
        assert model.file.paths == (merged,)
    with open_gguf(whole) as file:
        write_part(tmp_path / "one.gguf", whole, names, keys | {"split.count": u16(1)})
    with open_gguf(tmp_path / "one.gguf") as file:
        assert len(file.tensors) == len(names)


def refused(path: Path, *complaints: str) -> None:
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    for complaint in complaints:
        assert complaint in message


def test_a_missing_part_is_named(parts: list[Path], tmp_path: Path) -> None:
    here = [Path(shutil.copy(path, tmp_path)) for path in parts]
    here[1].unlink()
    refused(here[0], "is part 1 of 3 of a split file; missing ", str(here[1]), "put all parts into one folder")
    refused(here[2], "is part 3 of 3 of a split file; missing ", str(here[1]))


def test_names_must_say_which_part_it_is(parts: list[Path], tmp_path: Path) -> None:
    here = [Path(shutil.copy(path, tmp_path)) for path in parts]
    shutil.copy(here[0], tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf", "is part 1 of 3 of a split file, and its name does not say so", "-00001-of-00003")
    shutil.copy(here[0], here[1])
    refused(here[1], "is part 1 of 3 of a split file, and its name does not say so")
    refused(here[2], f"{here[1]} does not say that it is part 2 of 3")


def test_parts_of_another_file(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    here = [Path(shutil.copy(path, tmp_path)) for path in parts]
    with open_gguf(parts[1]) as file:
        names = [name for name, info in file.tensors.items() if info.part == 1]
        keys = {"split.no": u16(1), "split.count": u16(3), "split.tensors.count": i32(len(file.tensors))}
    write_part(here[1], whole, names[:-1], keys)
    refused(here[0], "its 3 parts hold", "were split")
    with open_gguf(whole) as file:
        first = next(iter(file.tensors))
    write_part(here[1], whole, [first], keys)
    refused(here[0], "is in two parts")


@pytest.mark.parametrize("value", [u16(3), i32(-1), string("2"), i32s([1])], ids=["late", "below", "text", "list"])
def test_numbers_that_are_none(whole: Path, tmp_path: Path, value: Typed) -> None:
    here = split(whole, tmp_path, 2, split_no=value)
    refused(here[0], "split.no", "split the file again")
    here = split(whole, tmp_path, 2, split_count=string("two"))
    refused(here[0], "split.count = 'two': it must be a whole number")


def test_the_commands_take_a_part(parts: list[Path]) -> None:
    command = [sys.executable, "-m", "auricle.tools", "inspect", str(parts[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "llm.embed.weight" in done.stdout
