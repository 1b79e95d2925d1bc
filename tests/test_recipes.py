"""Which tensor gets which type: the recipes on models of every size, overrides, rows that fill no block."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from auricle.convert import recipes
from auricle.convert.hf import plan_conversion
from auricle.convert.recipes import (
    FALLBACKS,
    LAST_FALLBACK,
    RECIPES,
    Choice,
    Recipe,
    Rule,
    choose_formats,
    find_recipe,
    parse_override,
)
from auricle.convert.source import ConversionError
from auricle.kernels.formats import BF16, BY_NAME, F16, F32, FORMATS, IQ4_NL, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K, Q8_0
from auricle.kernels.quantize import quantize
from auricle.tools.sample import SampleShape
from checkpoints import copy_checkpoint, sparse_checkpoint

ENCODER = {"enc_d_model": 1280, "enc_n_layer": 32, "enc_n_head": 20, "enc_d_ff": 5120, "enc_d_conv": 480}
FAMILY = SampleShape(
    **ENCODER, enc_d_out=1280, taps=(8, 16, 24), d_adapter=8192, n_layer=36, n_head=32, n_kv_head=8, n_vocab=151936
)
FULL_SIZE = {"4b": replace(FAMILY, d_model=2560, d_ff=9728), "8b": replace(FAMILY, d_model=4096, d_ff=12288)}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("full")
    return {name: sparse_checkpoint(folder / name, shape) for name, shape in FULL_SIZE.items()}


@pytest.mark.parametrize(
    ("model", "recipe", "gib"),
    [
        ("4b", "f16", 9.73), ("4b", "bf16", 9.73), ("4b", "f32", 19.46), ("4b", "q8_0", 5.18),
        ("4b", "q4_k", 3.34), ("4b", "q4_k_all", 2.75), ("4b", "q4_k_f16enc", 3.83),
        ("4b", "q3_k", 2.95), ("4b", "q5_k", 3.75), ("4b", "q6_k", 4.18),
        ("8b", "bf16", 16.87), ("8b", "q4_k", 5.54), ("8b", "q4_k_all", 4.75), ("8b", "q6_k", 7.12),
    ],
)  # fmt: skip
def test_full_size(full_size: dict[str, Path], model: str, recipe: str, gib: float) -> None:
    """Headers alone, of the published shapes: 901 tensors and the two computed; nothing falls back but convolutions."""
    plan = plan_conversion(full_size[model], recipe)
    sources = [row for row in plan if row.source]
    assert len(sources) == 901
    assert len({row.target for row in plan}) == len(plan) == 903
    assert sum(math.prod(row.shape) for row in sources) == pytest.approx({"4b": 5.22e9, "8b": 9.06e9}[model], rel=1e-3)
    assert plan.total_bytes / 2**30 == pytest.approx(gib, abs=0.011)
    assert not any(row.note for row in plan)
    kept = {row.target for row in plan if len(row.shape) == 1 or not row.source}
    kept |= {f"enc.conv{n}.weight" for n in (1, 2, 3)} if recipe == "bf16" else set()
    assert {row.target for row in plan if row.format is F32} == kept or recipe == "f32"


def test_published_sizes(full_size: dict[str, Path]) -> None:
    """The published all-Q4_K file of the 4B, but for its longer vocabulary, and the kind with an F16 encoder."""
    assert plan_conversion(full_size["4b"], "q4_k_all").total_bytes == pytest.approx(2_951_562_240, rel=1e-3)
    assert plan_conversion(full_size["4b"], "q4_k_f16enc").total_bytes / 2**30 == pytest.approx(3.8, abs=0.05)


def types(full_size: dict[str, Path], recipe: str) -> dict[str, str]:
    return {row.target: row.format.name for row in plan_conversion(full_size["4b"], recipe)}


def test_default_recipe(full_size: dict[str, Path]) -> None:
    found = types(full_size, "q4_k")
    assert found == {row.target: row.format.name for row in plan_conversion(full_size["4b"])}
    weights = {name: t for name, t in found.items() if name.endswith(".weight") and "norm" not in name}
    ears = {t for name, t in weights.items() if not name.startswith("llm.") and "conv" not in name}
    assert ears == {"Q8_0"}
    assert {t for name, t in weights.items() if "conv" in name} == {"F16"}
    assert (weights["llm.lm_head.weight"], weights["llm.embed.weight"]) == ("Q6_K", "Q4_K")
    # The first 4 (36 // 8) layers, those from 31 on (7 * 36 // 8), and every third between.
    better = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34, 35]
    for kind in ("ffn.down", "attn.v"):
        assert [n for n in range(36) if weights[f"llm.blk.{n}.{kind}.weight"] == "Q6_K"] == better
    others = [t for n, t in weights.items() if n.startswith("llm.blk.") and "ffn.down" not in n and "attn.v" not in n]
    assert set(others) == {"Q4_K"}


def test_other_recipes(full_size: dict[str, Path]) -> None:
    found = types(full_size, "q4_k_f16enc")
    assert found["enc.blk.3.attn.q.weight"] == found["adapter.up.weight"] == found["deepstack.2.down.weight"] == "F16"
    assert {t for name, t in found.items() if name.startswith("llm.") and "norm" not in name} == {"Q4_K"}
    found = types(full_size, "q3_k")
    assert [found[f"llm.blk.{n}.ffn.down.weight"] for n in (0, 4, 6)] == ["Q5_K", "Q4_K", "Q5_K"]
    assert (found["llm.blk.5.attn.o.weight"], found["llm.blk.5.attn.q.weight"]) == ("Q4_K", "Q3_K")
    assert types(full_size, "q6_k")["llm.lm_head.weight"] == "Q6_K"


def test_recipes_are_in_order() -> None:
    """No rule is hidden behind an earlier one, and each recipe ends with a rule for everything."""
    for recipe in RECIPES.values():
        keys = [(rule.pattern, rule.where) for rule in recipe.rules]
        assert len(set(keys)) == len(keys), recipe.name
        assert keys[-1] == ("*", "")
        assert keys.index(("*", "")) == len(keys) - 1


def test_a_tied_embedding_is_the_head() -> None:
    shapes = {"llm.embed.weight": (512, 256), "llm.blk.0.attn.q.weight": (256, 256)}
    assert choose_formats(find_recipe("q4_k"), shapes)["llm.embed.weight"].format is Q6_K
    shapes["llm.lm_head.weight"] = (512, 256)
    assert choose_formats(find_recipe("Q4_K"), shapes)["llm.embed.weight"].format is Q4_K


@pytest.mark.parametrize(("name", "n_cols", "expected"), [
    ("q2_k", 96, IQ4_NL), ("q3_k", 96, IQ4_NL), ("iq4_xs", 96, IQ4_NL), ("q4_k", 96, Q4_1), ("q5_k", 96, Q5_1),
    ("q6_k", 96, Q8_0), ("q4_k", 40, F16), ("q8_0", 40, F16), ("iq4_nl", 8, F16), ("q4_k", 512, Q4_K), ("f16", 7, F16),
])  # fmt: skip
def test_rows_that_fill_no_block(name: str, n_cols: int, expected: object) -> None:
    choice = choose_formats(find_recipe("f32"), {"w": (3, n_cols)}, [parse_override(f"w={name}")])["w"]
    asked = BY_NAME[name.upper()]
    note = "" if expected is asked else f"rows of {n_cols} do not fill blocks of {asked.length} ({asked})"
    assert choice == Choice(expected, note)


def test_falling_back_never_takes_bits_away() -> None:
    for fmt in FORMATS:
        smaller = FALLBACKS.get(fmt, LAST_FALLBACK)
        assert fmt.length == 1 or smaller.bits_per_weight > fmt.bits_per_weight
        assert fmt.length == 1 or smaller.length < fmt.length


def test_every_type_can_be_asked_for() -> None:
    """All types of the table have an encoder; one that could only be decoded would have to be refused."""
    rows = np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32)
    for fmt in FORMATS:
        assert parse_override(f"*={fmt.name.lower()}").format is fmt
        assert quantize(rows, fmt).shape == (2, fmt.row_bytes(256))


@pytest.mark.parametrize(("text", "message"), [
    ("q4_k", "'q4_k' says no type for a tensor: write PATTERN=TYPE"),
    ("=q4_k", "says no type"),
    ("llm.*=q4_k_m", "there is no type 'q4_k_m' .*choose one of f32, f16, .*iq4_xs"),
    ("llm.*=", "there is no type ''"),
])  # fmt: skip
def test_overrides_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        parse_override(text)
    assert "\n" not in str(caught.value)


def test_first_override_wins(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "sample")
    overrides = [parse_override(text) for text in ("llm.blk.1.*=Q4_0", "llm.blk.*.ffn.down.*=q5_0", "*attn*=bf16")]
    found = {row.target: row.format for row in plan_conversion(folder, "q8_0", overrides)}
    assert found["llm.blk.1.ffn.down.weight"].name == found["llm.blk.1.attn.q.weight"].name == "Q4_0"
    assert found["llm.blk.2.ffn.down.weight"].name == "Q5_0"
    assert found["llm.blk.2.attn.q.weight"] is found["enc.blk.0.attn.v.weight"] is BF16
    assert found["llm.blk.2.ffn.up.weight"] is Q8_0
    # Vectors and the front end's tables are what they are.
    everything = {row.target: row.format for row in plan_conversion(folder, "f16", [parse_override("*=q4_0")])}
    assert all(
        (everything[row.target] is F32) == (len(row.shape) == 1 or not row.source) for row in plan_conversion(folder)
    )
    assert everything["audio.mel_filters"] is F32


def test_an_override_must_match_something(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no tensor's name matches 'llm\.blk\.99\.\*'"):
        plan_conversion(copy_checkpoint(tmp_path / "sample"), "f16", [parse_override("llm.blk.99.*=q8_0")])


def test_importance_must_fit(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "sample")
    name = "llm.blk.0.attn.q.weight"
    for importance, message in [
        ({name: np.ones(63, np.float32)}, f"importance of {name} has 63 columns, the tensor 64"),
        ({name: np.full(64, np.nan, np.float32)}, f"importance of {name} is negative or not finite"),
        ({name: np.full(64, -1, np.float32)}, "negative"),
        ({"blk.0.attn_q.weight": np.ones(64, np.float32)}, "none of which is a tensor of this model"),
    ]:
        with pytest.raises(ConversionError, match=message) as caught:
            plan_conversion(folder, "q4_k", importance=importance)
        assert "\n" not in str(caught.value)
    plan = plan_conversion(folder, "q4_k", importance={name: np.ones(64, np.float32), "other": np.ones(1, np.float32)})
    assert any("importance weighs 1 of" in note for note in plan.notes)
    assert plan.importance.keys() == {name}


def test_notes_name_the_types_that_fell_back(tmp_path: Path) -> None:
    plan = plan_conversion(copy_checkpoint(tmp_path / "sample"), "q4_k_all")
    rows = [row for row in plan if row.note]
    assert {row.format for row in rows} <= {Q4_1, F16}
    assert any("attn.q.weight: Q4_1, rows of 64 do not fill blocks of 256 (Q4_K)" in note for note in plan.notes)
    assert any(note.startswith("llm.blk.{0-2}.attn.q.weight: ") for note in plan.notes)
    assert len([note for note in plan.notes if "do not fill" in note]) < len(rows)
    assert all(row.format is not Q5_K for row in plan)


def test_a_rule_for_each_tensor_takes_about_as_many_steps_as_there_are_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    n, asked = 2000, []
    monkeypatch.setattr(recipes, "fnmatchcase", lambda *pair: asked.append(pair) or fnmatchcase(*pair))
    shapes = {f"llm.blk.{i}.attn.q.weight": (256, 256) for i in range(n)}
    rules = tuple(Rule(name, Q6_K if i % 2 else Q8_0) for i, name in enumerate(shapes))
    found = choose_formats(Recipe("lora", 1, rules), shapes)
    assert [choice.format for choice in found.values()] == [Q8_0, Q6_K] * (n // 2)
    assert len(asked) < 10 * n


def test_the_first_rule_wins_whether_it_is_a_name_or_a_pattern() -> None:
    shapes = {"a.weight": (256, 256), "b.weight": (256, 256)}
    name, pattern = Rule("a.weight", Q6_K), Rule("*", Q8_0)
    for rules, want in (((name, pattern), Q6_K), ((pattern, name), Q8_0)):
        found = choose_formats(Recipe("x", 1, rules), shapes)
        assert (found["a.weight"].format, found["b.weight"].format) == (want, Q8_0)
