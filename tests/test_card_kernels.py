"""The products that `benchmarks/card.py` times and tunes, where there is no card: compared before anything is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import ROOT

pytest.importorskip("triton", reason="the kernels are written in Triton")
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "tests"))

import card_kernels
import card_tune
from roofline import read_moss_audio

from auricle.engine.models.moss_audio import decoder_graph, encoder_graph
from auricle.kernels.gpu.tune import Config, load_table
from auricle.tools.synth import PlannedFile

IN_THE_INTERPRETER = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
from dataclasses import replace
import card_kernels
from card_device import Pretence
from card_kernels import Product, Stock

gpu = Pretence()
backend, errors = gpu.backend(), {{}}
for product in (
    Product("plain", (24, 8), 256, normed=True),
    Product("gated", (24, 24), 256, normed=True, close="gate"),
    Product("added", (24,), 256, close="residual"),
    Product("head", (72,), 256, normed=True, close="argmax"),
):
    stock = Stock(product, "Q8_0", gpu, 9)
    for n in (1, 9):
        errors[f"{{product.name}} {{n}}"] = stock.error(stock.program(backend, n, copy=n % 2), n)
    other = Stock(product, "Q8_0", gpu, 1)
    weight = other.weights["w0"]
    other.weights["w0"] = replace(weight, data=weight.data[::-1].copy())  # the reference alone sees other rows
    errors[f"{{product.name}} of other weights"] = other.error(stock.program(backend, 1), 1)
    program = stock.program(backend, 1)
    for out in program.outputs.values():
        out.fill_(float("nan") if out.is_floating_point() else -1)
    errors[f"{{product.name}} unwritten"] = stock.error(program, 1)
print(json.dumps(errors))
"""


def test_a_product_is_compared() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 16
    for name, error in errors.items():
        if "unwritten" in name:
            assert error == float("inf"), name
        else:
            assert (error > card_kernels.BYTE_ERROR) == ("other weights" in name), f"{name}: {error}"


def test_all_matrices_of_the_model_are_there() -> None:
    config = read_moss_audio(PlannedFile("moss-audio-4b", "q4_k"))
    decoder = decoder_graph(config, 1, 1, head="all", with_audio=False).leaves_of("weight")
    encoder = encoder_graph(config, 1, 400, 50).leaves_of("weight")
    wanted = {v.shape for v in decoder if len(v.shape) == 2 and "embed" not in v.name}
    wanted |= {v.shape for v in encoder if len(v.shape) == 2 and v.name.startswith("enc.blk.")}
    assert {(n, p.n_cols) for p in card_kernels.list_products("moss-audio-4b") for n in p.rows} == wanted


def test_the_head_meets_few_tokens_and_the_encoder_many() -> None:
    products = {p.name: p for p in card_kernels.list_products("moss-audio-4b")}
    assert card_kernels.token_counts(products["head"]) == [1, 2, 4, 8]
    assert card_kernels.token_counts(products["enc.fc1"]) == [512]
    assert card_kernels.token_counts(products["down"]) == [1, 2, 4, 8, 512]


RULE, FAST, FASTER = Config(8, 512, 1, 4, 2), Config(16, 512, 1, 4, 2), Config(4, 512, 1, 4, 2)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({RULE: [10.0, 20.0], FAST: [9.0, 19.0], FASTER: [8.0, 20.1]}, FASTER),
        ({RULE: [10.0, 20.0], FAST: [9.0, 19.0], FASTER: [8.0, 21.0]}, FAST),  # slower at more tokens
        ({RULE: [10.0, 20.0], FAST: [9.9, 10.0]}, None),  # by chance
        ({FAST: [9.0, 19.0]}, None),  # the rule's was wrong, or was not timed
        ({}, None),
    ],
)
def test_no_cut_is_taken_that_is_slower_anywhere(times: dict, chosen: Config | None) -> None:
    assert card_tune.choose(times, RULE) == chosen


def test_the_table_that_tuning_writes_is_what_the_engine_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA Made-Up 9", capability=(9, 0), rehearsal=False, backend=lambda pick: pick)
    gpu.describe = lambda: {"gpu": gpu.name, "versions": {"triton": "0"}}
    task = next(t for t in card_tune.tasks(gpu) if t.kernel == "matvec")
    rule, fast, *_ = task.configs(gpu)
    (tmp_path / "cuts").mkdir()
    for config in (rule, fast):
        (tmp_path / "cuts" / card_tune.mark_of(task, config)).write_text("")
    monkeypatch.setattr(card_tune, "Stock", lambda *_: None)
    sizes = (task.type_name, 1, task.product.rows[0], task.product.n_cols)
    monkeypatch.setattr(
        card_tune, "time_config", lambda gpu, stock, pick, n: 1e-5 if pick(task.kernel, *sizes) == rule else 8e-6
    )
    result = card_tune.time_task(gpu, tmp_path, [], task)
    assert result["kept"] == asdict(fast)
    (entry,) = load_table(tmp_path / "tuned" / "nvidia-made-up-9.json")
    assert (entry.kernel, entry.n_tokens, entry.config) == ("matvec", card_tune.FEW, fast)
