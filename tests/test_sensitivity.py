"""What each tensor costs: beside whole files in which it alone differs, and from the report to a better file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auricle.convert.budget import Budget, measured_names, read_report
from auricle.convert.hf import convert, plan_conversion
from auricle.convert.recipes import parse_override
from auricle.convert.requantize import plan_requantization
from auricle.engine.gguf import open_gguf
from auricle.tools.diff import thresholds
from auricle.tools.diff.locate import added_errors, compare_ops
from auricle.tools.diff.request import DiffError, make_request, open_model
from auricle.tools.diff.sensitivity import make_groups, measure, sensitivity_table, share_out
from auricle.tools.diff.sources import ModelFile
from auricle.tools.sample import SampleShape, write_checkpoint
from auricle.tools.stages import mean_divergence, trace_stages
from sounds import encode, synthetic
from support import auricle

SHAPE = SampleShape(
    n_window=20,
    enc_n_layer=2,
    enc_d_model=96,
    enc_n_head=2,
    enc_d_ff=128,
    enc_d_out=64,
    d_adapter=96,
    taps=(0,),
    n_inject=1,
    n_layer=2,
    d_ff=512,
    n_head=2,
    d_head=128,
)
TINY = replace(SHAPE, n_layer=1, enc_n_layer=1, d_ff=256)
PROMPT = "What do you hear?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("sensitivity"), SHAPE)


def make_files(folder: Path, shape: SampleShape) -> Path:
    """A model in F16 and Q4_K and two clips."""
    write_checkpoint(folder / "checkpoint", shape, seed=4)
    convert(plan_conversion(folder / "checkpoint", "f16"), folder / "f16.gguf")
    convert(plan_requantization(folder / "f16.gguf", "q4_k"), folder / "q4.gguf")
    for name, seconds, seed in (("a.wav", 1.3, 0), ("b.wav", 2.1, 5)):
        (folder / name).write_bytes(encode(synthetic(seconds, 16_000, seed=seed), 16_000, "wav"))
    return folder


def report_on(folder: Path, name: str = "q4.gguf", n_new: int = 0, **options: Any) -> dict[str, Any]:
    asked = make_request([folder / "a.wav"], PROMPT, n_new)
    with (
        open_model(folder / name, asked, backend="reference") as model,
        open_model(folder / "f16.gguf", asked, backend=options.pop("backend", "reference"), precision="exact") as exact,
    ):
        return measure(model, exact, asked, **options)


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return report_on(folder)


def logits(path: Path, clip: Path) -> np.ndarray:
    asked = make_request([clip], PROMPT, 0)
    with open_model(path, asked, backend="reference") as model:
        heard = model.listen(clip)
        return trace_stages(model, heard, model.build_prompt(PROMPT, heard), ["logits"])["logits"]


@pytest.mark.parametrize(
    "name",
    ["llm.embed", "llm.blk.1.attn.v", "llm.blk.1.ffn.down", "enc.blk.0.ffn.fc1", "deepstack.0.up", "adapter.down"],
)
def test_damage_is_that_of_a_file_with_one_tensor_changed(folder: Path, report: dict[str, Any], name: str) -> None:
    """A whole file, written and run from the beginning."""
    check_damage(folder, report, name)


def check_damage(folder: Path, report: dict[str, Any], name: str) -> None:
    entry = next(t for t in report["tensors"] if t["name"] == f"{name}.weight")
    override = parse_override(f"{name}.weight={entry['type']}")
    convert(plan_requantization(folder / "f16.gguf", "f16", [override]), folder / "one.gguf")
    exact = logits(folder / "f16.gguf", folder / "a.wav")
    want = mean_divergence(logits(folder / "one.gguf", folder / "a.wav"), exact)
    assert entry["kl"] == pytest.approx(want, rel=1e-3)
    assert want > 1e-9


def test_a_tied_embedding_counts_where_it_is_looked_up_and_as_the_head(tmp_path: Path) -> None:
    make_files(tmp_path, replace(TINY, tied=True))
    check_damage(tmp_path, report_on(tmp_path), "llm.embed")


def test_errors_are_those_of_isolated_ops(folder: Path, report: dict[str, Any]) -> None:
    asked = make_request([folder / "a.wav"], PROMPT, 0)
    other = ModelFile(folder / "f16.gguf", asked, "reference")
    with open_model(folder / "q4.gguf", asked, backend="reference") as model:
        added = added_errors(compare_ops(model, asked, other, None, ()))
    other.close()
    errors = {t["name"]: t["error"] for t in report["tensors"]}
    # What is looked up counts all rows alike here; the stem's bias counts into the output there.
    for name in errors.keys() - {"llm.embed.weight", "enc.stem_proj.weight"}:
        bias = name.startswith("enc.")
        assert errors[name] == pytest.approx(np.sqrt(added[name]), rel=0.1 if bias else 1e-3), name


def test_the_report_is_whole(folder: Path, report: dict[str, Any]) -> None:
    with open_gguf(folder / "q4.gguf") as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    tensors = report["tensors"]
    assert {t["name"] for t in tensors} == set(measured_names(shapes))
    assert [t["kl"] for t in tensors] == sorted((t["kl"] for t in tensors), reverse=True)
    assert sum(t["share"] for t in tensors) == pytest.approx(1)
    assert all(t["bytes"] == sizes[t["name"]] for t in tensors)
    assert report["measured"]["n_positions"] == report["measured"]["n_tokens"]
    exact, own = (logits(folder / name, folder / "a.wav") for name in ("f16.gguf", "q4.gguf"))
    assert report["total"]["kl"] == pytest.approx(mean_divergence(own, exact), rel=1e-3)
    assert report["total"]["sum"] == pytest.approx(report["total"]["kl"], rel=0.3), "damages add up"
    json.dumps(report, allow_nan=False)
    for t in tensors:
        kinds = sorted(t["types"].values(), key=lambda v: v["bytes"])
        if t["name"].startswith("llm."):
            assert [v["kl"] for v in kinds] == sorted((v["kl"] for v in kinds), reverse=True), t["name"]
        assert t["types"]["F16"]["error"] == 0
        assert t["types"][t["type"]]["kl"] == pytest.approx(t["kl"])


def test_other_types_follow_the_squared_error(folder: Path, report: dict[str, Any]) -> None:
    """What is said of a type that the file has not, and what a file of that type does."""
    entry = next(t for t in report["tensors"] if t["name"] == "llm.blk.0.attn.o.weight")
    exact = logits(folder / "f16.gguf", folder / "a.wav")
    for name in entry["types"].keys() - {entry["type"], "F16"}:
        override = parse_override(f"llm.blk.0.attn.o.weight={name}")
        convert(plan_requantization(folder / "f16.gguf", "f16", [override]), folder / "one.gguf")
        found = mean_divergence(logits(folder / "one.gguf", folder / "a.wav"), exact)
        assert 0.4 < entry["types"][name]["kl"] / found < 2.5, name


def test_by_layer_sums_are_kept_and_the_order_nearly(folder: Path, report: dict[str, Any]) -> None:
    coarse = report_on(folder, probe="layer", backend="cpu")
    assert coarse["measured"]["probe"] == "layer"
    assert "llm.blk.0.attn.v.weight" in make_groups([t["name"] for t in coarse["tensors"]], "layer")["llm.blk.0.[all]"]
    fine, rough = ({t["name"]: t["kl"] for t in r["tensors"]} for r in (report, coarse))
    for name in (n for n in fine if ".blk." not in n):
        assert rough[name] == pytest.approx(fine[name], rel=1e-3)
    names = sorted(fine)
    ranks = [np.argsort(np.argsort([r[name] for name in names])) for r in (fine, rough)]
    assert np.corrcoef(ranks)[0, 1] > 0.85
    assert coarse["total"]["sum"] == pytest.approx(report["total"]["sum"], rel=0.4)


def test_sharing_out_finds_gains_of_layers_and_roles() -> None:
    """Damages that are a gain of the layer times one of the role times the squared error are found again exactly."""
    rng = np.random.default_rng(1)
    layers, roles = rng.uniform(0.1, 10, 5), rng.uniform(0.1, 10, 4)
    errors = {f"llm.blk.{i}.r{j}.weight": rng.uniform(1, 3) for i in range(5) for j in range(4)} | {"x.weight": 1.0}
    true = {n: 7.0 if n[0] == "x" else errors[n] * layers[int(n[8])] * roles[int(n[11])] for n in errors}
    groups = make_groups(list(errors), "layer")
    assert len(groups) == 5 + 4 + 1
    found = {key: sum(true[n] for n in members) for key, members in groups.items()}
    assert share_out(found, groups, errors) == pytest.approx(true, rel=1e-6)


def test_a_file_like_the_reference_is_probed_all_the_same(tmp_path: Path) -> None:
    found = report_on(make_files(tmp_path, TINY), "f16.gguf")
    assert (found["total"]["kl"], found["total"]["sum"]) == (0, 0)
    assert all(t["error"] == t["kl"] == t["share"] == 0 for t in found["tensors"])
    assert all(t["types"]["Q8_0"]["kl"] > 0 for t in found["tensors"])


def test_the_answer_counts(folder: Path, report: dict[str, Any]) -> None:
    with_answer = report_on(folder, n_new=8)
    assert report["measured"]["n_tokens"] < with_answer["measured"]["n_tokens"] <= report["measured"]["n_tokens"] + 8


def test_files_of_two_models(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SampleShape(), seed=4)
    convert(plan_conversion(tmp_path / "checkpoint", "q8_0"), tmp_path / "other.gguf")
    with pytest.raises(DiffError, match="of the reference's shape; compare files of one model"):
        report_on(folder, tmp_path / "other.gguf")


# Limits by type, which live in thresholds.py.


def test_limits_tell_a_type_from_the_next_better_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ops of a Q4_K file are within the limits of Q4_K, and some outside of those of a type of one bit more."""
    asked = make_request([folder / "a.wav"], PROMPT, 0)
    failed = []
    for noise in (thresholds.NOISE["Q4_K"], thresholds.NOISE["Q5_K"]):
        monkeypatch.setitem(thresholds.NOISE, "Q4_K", noise)
        other = ModelFile(folder / "f16.gguf", asked, "reference")
        with open_model(folder / "q4.gguf", asked, backend="reference") as model:
            results = compare_ops(model, asked, other, None, ())
        other.close()
        failed.append({t for r in results if r.failures for t in r.types.values()})
    assert failed[0] == set()
    assert "Q4_K / F16" in failed[1]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K"])
def test_limits_mean_something_for_every_type(type_name: str) -> None:
    """What goes through the whole model must still point the same way, and a divergence be worth reading."""
    noise = thresholds.NOISE[type_name]
    op, stage, whole = (thresholds.limits_for("logits", ["linear"], noise, s, 200) for s in ("op", "stage", "model"))
    assert op["cos_min"] > stage["cos_min"] > whole["cos_min"] > 0.3
    assert stage["kl_mean"] < whole["kl_mean"] == pytest.approx(50 * noise**2, rel=0.01)
    few = thresholds.limits_for("decode.logits", (), noise, "model", 16)
    assert few["top1"] <= whole["top1"] < 0.95


# The commands.


def test_from_two_files_to_a_better_one(folder: Path) -> None:
    """Measured on one recording, better than the recipe on another, and no larger."""
    path, out, q4 = folder / "report.json", folder / "made.gguf", folder / "q4.gguf"
    diff = ["diff", q4, folder / "a.wav", "--against", folder / "f16.gguf", "--sensitivity", path, "--tokens", 4]
    status, text, _ = auricle(*diff)
    assert status == 0, text
    first = json.loads(path.read_text())["tensors"][0]
    header, best, *_ = text.partition("what each tensor costs")[2].splitlines()[1:]
    assert header.split()[:3] == ["tensor", "type", "bytes"]
    assert best.split()[:3] == [first["name"], first["type"], f"{first['bytes']:,}"]
    assert "all at once" in text
    status, text, _ = auricle(*diff, "--json", "--probe", "layer")
    assert json.loads(text)["sensitivity"] == json.loads(path.read_text())
    status, _, notes = auricle(
        "quantize", folder / "f16.gguf", out, "--target-size", q4.stat().st_size, "--sensitivity", path
    )
    assert status == 0, notes
    assert out.stat().st_size <= q4.stat().st_size
    exact, fixed, made = (logits(folder / name, folder / "b.wav") for name in ("f16.gguf", "q4.gguf", "made.gguf"))
    assert mean_divergence(made, exact) < 0.9 * mean_divergence(fixed, exact)


def test_a_budget_for_a_report_of_another_file(folder: Path, report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(report))
    plan = plan_requantization(folder / "f16.gguf", budget=Budget(1 << 30, read_report(tmp_path / "r.json")))
    assert "divergence of the logits by the report: 0.00e+00 nats" in plan.notes[0]


@pytest.mark.parametrize(
    ("options", "expected", "complaint"),
    [
        (["--checkpoint", "x", "--sensitivity", "r.json"], 2, "--sensitivity needs the exact file"),
        (["--against", "f16.gguf", "--sensitivity", "r.json", "--probe", "all"], 2, "--probe is 'all'"),
        (
            ["--against", "{f16}", "--sensitivity", "/nowhere/r.json", "--tokens", "0"],
            8,
            "/nowhere is not a folder",
        ),
    ],
)
def test_wrong_use_is_one_line(folder: Path, options: list[str], expected: int, complaint: str) -> None:
    options = [option.format(f16=folder / "f16.gguf") for option in options]
    status, _, notes = auricle("diff", folder / "q4.gguf", folder / "a.wav", *options)
    assert (status, notes.count("\n")) == (expected, 1), notes
    assert complaint in notes


def test_the_table_sums_up_what_it_leaves_out(report: dict[str, Any]) -> None:
    table = sensitivity_table(report)
    assert table.row_count == 22
    assert len(report["tensors"]) > 20
