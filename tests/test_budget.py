"""Types made to measure: the choice itself, its limits, and the files that come of it."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.convert.budget import CANDIDATES, Budget, Option, choose_options, fingerprint, measured_names, read_report
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.recipes import fit_rows, parse_override
from auricle.convert.requantize import plan_requantization
from auricle.convert.source import ConversionError
from auricle.engine.gguf import open_gguf
from auricle.engine.sampling import OptionError
from auricle.kernels.formats import BY_NAME, F16, Q3_K, Q4_1, Q4_K, Q8_0, Format
from auricle.tools.cli.options import parse_size
from auricle.tools.sample import SampleShape
from checkpoints import build_f32, change_tensors, copy_checkpoint
from support import auricle

# Rows of 256 fill the blocks of all candidates, those of 96 of few; the encoder is as the floor allows.
SHAPE = SampleShape(
    n_window=20,
    enc_n_layer=2,
    enc_d_model=64,
    enc_n_head=2,
    enc_d_ff=96,
    enc_d_out=64,
    d_adapter=96,
    taps=(0,),
    n_inject=1,
    n_layer=2,
    d_ff=512,
    n_head=2,
)


# The choice.


options = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=4), min_size=1, max_size=6
).map(lambda tensors: [[Option(F16, n, float(d)) for n, d in choices] for choices in tensors])


def cost(tensors: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    picked = [choices[i] for choices, i in zip(tensors, chosen, strict=True)]
    return sum(o.nbytes for o in picked), sum(o.damage for o in picked)


@settings(max_examples=300, deadline=None)
@given(options, st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_never_above_the_target_and_never_worse_for_more(tensors: list[list[Option]], extra: list[int]) -> None:
    least = sum(min(o.nbytes for o in choices) for choices in tensors)
    damages = []
    for more in sorted(extra):
        chosen = choose_options(tensors, least + more)
        nbytes, damage = cost(tensors, chosen)
        assert nbytes <= least + more
        assert chosen == choose_options(tensors, least + more)
        damages.append(damage)
    assert damages == sorted(damages, reverse=True)


@settings(max_examples=200, deadline=None)
@given(options, st.integers(0, 120))
def test_near_the_best_there_is(tensors: list[list[Option]], more: int) -> None:
    """Not more damage than the best of all choices and the largest gain that a single step of a hull brings."""
    limit = sum(min(o.nbytes for o in choices) for choices in tensors) + more
    all_costs = [cost(tensors, list(c)) for c in product(*(range(len(choices)) for choices in tensors))]
    best = min(damage for nbytes, damage in all_costs if nbytes <= limit)
    widest = max(max(o.damage for o in choices) - min(o.damage for o in choices) for choices in tensors)
    assert best <= cost(tensors, choose_options(tensors, limit))[1] <= best + widest


def test_bits_go_where_they_matter() -> None:
    """Of three tensors of one size, that which matters 100 times as much gets the more bits."""
    damage = {Q3_K: 64.0, Q4_K: 16.0, Q8_0: 0.25}
    nbytes = {f: round(100 * f.bits_per_weight) for f in damage}
    tensors = [[Option(f, nbytes[f], gain * d) for f, d in damage.items()] for gain in (1, 100, 10000)]
    chosen = choose_options(tensors, sum(nbytes.values()))
    assert [tensors[0][i].format for i in chosen] == [Q3_K, Q4_K, Q8_0]


def test_what_is_left_is_spent() -> None:
    """A step that does not fit does not keep a smaller one from being taken."""
    big = [Option(Q4_K, 10, 100.0), Option(Q8_0, 110, 0.0)]
    small = [Option(Q4_K, 10, 5.0), Option(Q8_0, 20, 0.0)]
    assert choose_options([big, small], 119) == [0, 1]
    assert choose_options([big, small], 120) == [1, 0]
    assert choose_options([big, small], 130) == [1, 1]
    cheap = [Option(Q4_K, 10, 11.0), Option(Q8_0, 20, 0.0)]
    assert choose_options([big, cheap], 125) == [1, 0], "a better step a byte is given up for one that takes away more"


# Files.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    checkpoint, _ = build_f32(folder, SHAPE, seed=3)
    convert(plan_conversion(checkpoint, "f16"), folder / "f16.gguf")
    write_report(folder / "report.json", folder / "f16.gguf")
    return folder


def write_report(path: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A report with made-up damages: four times less for each bit, and different for each tensor."""
    rng = np.random.default_rng(0)
    with open_gguf(model) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        about = {"name": file.metadata.get("general.name", ""), "fingerprint": fingerprint(file)}
    tensors = []
    for name in measured_names(shapes):
        gain = float(np.exp(2 * rng.standard_normal()))
        types = {fit_rows(f, shapes[name][-1]) for f in CANDIDATES}
        damage = {f.name: {"kl": 0.0 if f is F16 else gain * 4.0**-f.bits_per_weight} for f in types}
        tensors.append({"name": name, "shape": list(shapes[name]), "types": damage})
    report = {"format": "auricle.sensitivity", "version": 1, "model": about, "tensors": tensors} | changes
    path.write_text(json.dumps(report))
    return report


def budget(folder: Path, size: int, floor: Format = Q8_0) -> Budget:
    return Budget(size, read_report(folder / "report.json"), floor)


def smallest(folder: Path, **more: Any) -> int:
    with pytest.raises(ConversionError, match="cannot be made: the smallest has ") as caught:
        plan_requantization(folder / "f16.gguf", budget=budget(folder, 1), **more)
    assert "\n" not in str(caught.value)
    return int(re.search(r"smallest has ([\d,]+)", str(caught.value))[1].replace(",", ""))


def test_files_fill_their_target(folder: Path) -> None:
    """From the smallest that can be made, to the byte, to one in which all is F16."""
    least = smallest(folder)
    whole = (folder / "f16.gguf").stat().st_size
    sizes = []
    for target in (least, least + 1, (least + whole) // 2, whole + 1000):
        plan = plan_requantization(folder / "f16.gguf", budget=budget(folder, target))
        convert(plan, folder / "out.gguf")
        sizes.append((folder / "out.gguf").stat().st_size)
        assert sizes[-1] == plan.total_bytes <= target
    assert sizes[:2] == [least, least]
    assert sizes[2] > 0.98 * (least + whole) // 2
    assert all(row.format.name in ("F16", "F32") for row in plan)
    with pytest.raises(ConversionError, match=f"the smallest has {least:,}"):
        plan_requantization(folder / "f16.gguf", budget=budget(folder, least - 1))


def test_the_encoder_has_a_floor(folder: Path) -> None:
    def ears(floor: Format) -> dict[str, Format]:
        plan = plan_requantization(folder / "f16.gguf", budget=budget(folder, smallest(folder) + 20_000, floor))
        return {r.target: r.format for r in plan if r.part in ("encoder", "adapter", "deepstack") and len(r.shape) == 2}

    assert min(f.bits_per_weight for f in ears(Q8_0).values()) == Q8_0.bits_per_weight
    assert min(f.bits_per_weight for f in ears(Q3_K).values()) < Q8_0.bits_per_weight


def test_rows_that_fill_no_block_and_overrides(folder: Path) -> None:
    """Only types that fit are chosen; a tensor that is named keeps the type it was given, and counts."""
    least = smallest(folder, overrides=[parse_override("llm.embed.*=f16"), parse_override("enc.blk.0.*=q4_k")])
    overrides = [parse_override("llm.embed.*=f16"), parse_override("enc.blk.0.*=q4_k")]
    plan = plan_requantization(folder / "f16.gguf", overrides=overrides, budget=budget(folder, least))
    found = {row.target: row.format for row in plan}
    assert plan.total_bytes == least
    assert found["llm.embed.weight"] is F16
    assert found["enc.blk.0.ffn.fc2.weight"] is Q4_1, "rows of 96"
    assert found["enc.blk.1.ffn.fc2.weight"] is Q8_0
    assert all(row.shape[-1] % row.format.length == 0 for row in plan)


def test_nothing_left_to_choose(folder: Path) -> None:
    plan = plan_requantization(
        folder / "f16.gguf", overrides=[parse_override("*=q8_0")], budget=budget(folder, 1 << 30)
    )
    assert {row.format for row in plan if len(row.shape) == 2 and row.part == "decoder"} == {Q8_0}


def test_the_choice_is_recorded_and_repeatable(folder: Path) -> None:
    target = smallest(folder) + 30_000
    for name in ("one.gguf", "two.gguf"):
        convert(plan_requantization(folder / "f16.gguf", budget=budget(folder, target)), folder / name)
    assert (folder / "one.gguf").read_bytes() == (folder / "two.gguf").read_bytes()
    with open_gguf(folder / "one.gguf") as file:
        assert file.metadata.get("auricle.budget.target_bytes") == target
        assert file.metadata.get("auricle.budget.encoder_floor") == "Q8_0"
        assert re.fullmatch("[0-9a-f]{64}", file.metadata.get("auricle.budget.report_sha256"))
        assert file.metadata.get("general.file_type") in (12, 15, 17, 18, 7, 1)
    with open_gguf(folder / "one.gguf") as quantised, open_gguf(folder / "f16.gguf") as exact:
        assert fingerprint(quantised) == fingerprint(exact), "types do not change which model it is"


def test_a_recipe_forgets_the_budget_before(folder: Path) -> None:
    convert(plan_requantization(folder / "f16.gguf", budget=budget(folder, 1 << 30)), folder / "made.gguf")
    plan = plan_requantization(folder / "made.gguf", "q8_0")
    assert not [key for key in plan.metadata if "budget" in key]


def test_importance_goes_with_it(folder: Path) -> None:
    importance = {"llm.blk.0.ffn.up.weight": np.linspace(0.1, 9, 256, dtype=np.float32)}
    target = smallest(folder) + 30_000
    plans = [
        plan_requantization(folder / "f16.gguf", importance=given, budget=budget(folder, target))
        for given in (None, importance)
    ]
    assert [r.format for r in plans[0]] == [r.format for r in plans[1]]
    assert plans[1].importance.keys() == importance.keys()


# Reports that do not fit.


def test_a_report_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(tmp_path / "checkpoint", SHAPE)
    convert(plan_conversion(other, "f16"), tmp_path / "other.gguf")
    with pytest.raises(ConversionError, match=r"was measured on another model .*shapes agree"):
        plan_requantization(tmp_path / "other.gguf", budget=budget(folder, 1 << 30))
    report = json.loads((folder / "report.json").read_text())
    report["tensors"][0]["shape"][0] += 1
    (tmp_path / "shape.json").write_text(json.dumps(report))
    with pytest.raises(
        ConversionError, match=f"another model .*{re.escape(report['tensors'][0]['name'])} is "
    ) as caught:
        plan_requantization(folder / "f16.gguf", budget=Budget(1 << 30, read_report(tmp_path / "shape.json")))
    assert "\n" not in str(caught.value)
    del report["tensors"][0]
    (tmp_path / "less.json").write_text(json.dumps(report))
    with pytest.raises(ConversionError, match=r"another model .* absent there"):
        plan_requantization(folder / "f16.gguf", budget=Budget(1 << 30, read_report(tmp_path / "less.json")))


def test_a_fine_tune_is_another_model(folder: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(tmp_path / "a", SHAPE)
    after = copy_checkpoint(tmp_path / "b", SHAPE)
    change_tensors(after, lambda t: t["language_model.norm.weight"].mul_(1.5))
    found = []
    for source, name in ((before, "f16"), (before, "q8_0"), (before, "f32"), (after, "f16")):
        convert(plan_conversion(source, name), tmp_path / "x.gguf")
        with open_gguf(tmp_path / "x.gguf") as file:
            found.append(fingerprint(file))
    assert found[0] == found[1] == found[2] != found[3]


REPORT = '{"format": "auricle.sensitivity", "version": 1, "tensors": %s}'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing", "is not JSON .* give the file of auricle diff --sensitivity"),
        ("[]", "holds a list, not a JSON object; give the file of auricle diff --sensitivity"),
        ('{"format": ["auricle.sensitivity"], "version": 1}', "says format = .*: it must be a text"),
        ('{"format": "auricle.diff", "version": 1}', "is auricle.diff 1, not auricle.sensitivity 1"),
        ('{"format": "auricle.sensitivity", "version": 1}', "lacks tensors; give the file of auricle diff"),
        (REPORT % "[1]", r"tensors = \[1\]: it must be a list of objects"),
        (REPORT % "[{}]", "tensor 0 lacks name"),
        (REPORT % '[{"name": ["a"]}]', r"tensor 0 says name = \['a'\]: it must be a text"),
        (REPORT % '[{"name": "a", "shape": [1, "2"]}]', "tensor 0 says shape = .*: it must be a list of whole numbers"),
        (REPORT % '[{"name": "a", "shape": [1], "types": []}]', r"types = \[\]: it must be an object"),
        (REPORT % '[{"name": "a", "shape": [1], "types": {"Q9": {}}}]', "the damage of a is missing"),
        (REPORT % '[{"name": "a", "shape": [1], "types": {"Q8_0": 1}}]', "types.Q8_0 = 1: it must be an object"),
        (REPORT % '[{"name": "a\\ud800"}]', "half a character"),
        (REPORT % f'[{{"name": "a", "shape": [{"1" * 5000}]}}]', "a number of 5000 digits"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConversionError, match=complaint) as caught:
        read_report(tmp_path / "r.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConversionError, match="cannot be read"):
        read_report(tmp_path / "absent.json")


@pytest.mark.parametrize("kl", [-1.0, float("nan"), float("inf"), "much", None])
def test_damage_must_be_a_number(folder: Path, tmp_path: Path, kl: object) -> None:
    report = json.loads((folder / "report.json").read_text())
    next(iter(report["tensors"][5]["types"].values()))["kl"] = kl
    (tmp_path / "r.json").write_text(json.dumps(report))
    with pytest.raises(ConversionError, match=r"types\.\w+\.kl( = .*: it must be (a number|0.0 or more);|; give)"):
        read_report(tmp_path / "r.json")


# The command.


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2.6GiB", 2_791_728_742), ("2.6 gib", 2_791_728_742), ("800MB", 800_000_000), ("1MiB", 1 << 20),
        ("12345", 12345), ("12345 bytes", 12345), ("3kb", 3000), ("0.5KiB", 512), ("1_000_000", 1_000_000),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-3", "0", "2.6 GiBs", "nan", "1e9", "2,6GiB", "²GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match=r"is no size; write 2\.6GiB"):
        parse_size(text)


def test_the_command(folder: Path) -> None:
    source, out, report = folder / "f16.gguf", folder / "cli.gguf", folder / "report.json"
    size = smallest(folder) + 10_000
    arguments = ["quantize", source, out, "--target-size", size, "--sensitivity", report]
    status, text, notes = auricle(*arguments, "--dry-run")
    assert (status, out.exists()) == (0, False)
    assert "divergence of the logits by the report" in notes
    planned = int(re.search(r"file: ([\d,]+) bytes", text)[1].replace(",", ""))
    assert auricle(*arguments)[0] == 0
    assert out.stat().st_size == planned <= size
    floored = [*arguments[:4], 1, *arguments[5:], "--encoder-floor", "q4_k"]
    for wrong, expected, complaint in (
        ([*arguments[:4], "1KiB", *arguments[5:]], 6, "a file of 1,024 bytes cannot be made: the smallest has "),
        (floored, 6, "an encoder of at least Q4_K"),
        ([*arguments, "--type", "q4_k"], 2, "both choose the types"),
        (["quantize", source, out, "--target-size", size], 2, "--target-size and --sensitivity go together"),
        (["quantize", source, out, "--sensitivity", report], 2, "--target-size and --sensitivity go together"),
        ([*arguments[:4], "big", *arguments[5:]], 2, "'big' is no size"),
        ([*arguments, "--encoder-floor", "q9"], 6, "there is no type 'q9'"),
        ([*arguments[:6], source], 6, "is not JSON"),
    ):
        status, text, notes = auricle(*wrong)
        assert (status, notes.count("\n")) == (expected, 1), notes
        assert complaint in notes


def test_every_candidate_has_a_file_type() -> None:
    from auricle.convert.budget import FILE_TYPES

    fitting = {fit_rows(f, n).name for f in CANDIDATES for n in (256, 96, 40)}
    assert fitting <= FILE_TYPES.keys() <= BY_NAME.keys()
