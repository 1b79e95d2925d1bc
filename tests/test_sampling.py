"""The sampler against Hugging Face's logits processors, and its promises: order, ties, seeds, refused options."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auricle.engine.sampling import NonFiniteError, OptionError, Sampler, SamplingOptions, penalise

N_VOCAB = 151_936


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def random_logits(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)


def kept(options: dict, scores: np.ndarray, history: list[int] = ()) -> list[int]:
    return Sampler(SamplingOptions(**{"temperature": 1.0} | options)).distribution(scores, history)[0].tolist()


def hugging_face(options: SamplingOptions, scores: np.ndarray, history: list[int]) -> np.ndarray:
    """Probabilities by transformers' own processors, in the order its generation applies them."""
    pytest.importorskip("transformers", reason="the oracle extra is not installed")
    import torch
    from transformers.generation import logits_process as lp

    ids, row = torch.tensor([history], dtype=torch.long), torch.from_numpy(scores.copy())[None].double()
    chain = [lp.TemperatureLogitsWarper(options.temperature)]
    if history and options.repetition_penalty != 1:
        chain.insert(0, lp.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.top_k:
        chain.append(lp.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(lp.TopPLogitsWarper(options.top_p))
    if options.min_p:
        chain.append(lp.MinPLogitsWarper(options.min_p))
    for process in chain:
        row = process(ids, row)
    return row.softmax(-1)[0].numpy()


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


@given(OPTIONS, st.integers(0, 1000), st.lists(st.integers(0, 79), max_size=30))
@settings(max_examples=100, deadline=None)
def test_distribution_equals_hugging_face(options, seed, history):
    scores = random_logits(80, seed)
    ids, probabilities = Sampler(options).distribution(scores, history)
    ours = np.zeros(80)
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, hugging_face(options, scores, history), atol=1e-6)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}, {"min_p": 0.1}, {"top_p": 0.999}])
def test_distribution_of_a_whole_vocabulary(options):
    scores = random_logits(N_VOCAB)
    chosen = SamplingOptions(temperature=1.0, **options)
    ids, probabilities = Sampler(chosen).distribution(scores, [])
    ours = np.zeros(N_VOCAB)
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, hugging_face(chosen, scores, []), atol=1e-7)


def test_draws_follow_the_distribution():
    sampler = Sampler(SamplingOptions(temperature=0.8, top_k=6, min_p=0.05, seed=7))
    scores = random_logits(40, seed=3)
    ids, probabilities = sampler.distribution(scores, [])
    drawn = np.bincount([sampler.sample(scores, []) for _ in range(8_000)], minlength=40) / 8_000
    np.testing.assert_allclose(drawn[ids], probabilities, atol=0.02)
    assert drawn[ids].sum() == 1


def test_greedy_takes_the_lowest_id_of_equals():
    assert Sampler(SamplingOptions()).sample(logits(0, 3, -1, 3), []) == 1
    assert Sampler(SamplingOptions(top_k=3, top_p=0.1, seed=1)).sample(logits(5, 3, 9), []) == 2
    assert Sampler(SamplingOptions(repetition_penalty=2.0)).sample(logits(4, 3, 1), [0, 0]) == 1


def test_greedy_leaves_the_logits_alone():
    scores = logits(4, 3, 1)
    Sampler(SamplingOptions(repetition_penalty=2.0)).sample(scores, [0])
    assert scores.tolist() == [4, 3, 1]


def test_penalty_counts_an_id_once_and_knows_the_sign():
    assert penalise(logits(4, -4, 2, 0), [0, 0, 1, 3], 2.0).tolist() == [2, -8, 2, 0]


def test_order_of_the_filters():
    # The temperature comes before top-p: a cold distribution needs fewer tokens for the same mass.
    assert kept({"top_p": 0.8}, logits(2, 1, 0)) == [0, 1]
    assert kept({"top_p": 0.8, "temperature": 0.2}, logits(2, 1, 0)) == [0]
    # Top-k comes before top-p: the mass of the two that stay is counted as 1.
    half = np.log(logits(0.4, 0.35, 0.25))
    assert kept({"top_p": 0.5}, half) == [0, 1]
    assert kept({"top_p": 0.5, "top_k": 2}, half) == [0]
    # The penalty comes before everything.
    assert kept({"top_k": 1, "repetition_penalty": 4.0}, logits(2, 1, 0), [0]) == [1]


def test_equals():
    assert kept({"top_k": 2}, logits(1, 5, 1, 1)) == [0, 1, 2, 3]  # all equals of the k-th stay
    assert kept({"top_p": 0.5}, np.zeros(4, np.float32)) == [0, 1]  # the first of equals, no more than needed
    assert kept({"top_p": 0.5}, np.zeros(4096, np.float32)) == list(range(2048))
    assert kept({"min_p": 1.0}, logits(1, 5, 5)) == [1, 2]


def test_seeds():
    scores = [random_logits(N_VOCAB, seed) for seed in range(5)]

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed))
        return [sampler.sample(row, []) for row in scores]

    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)


def test_extreme_temperatures_and_logits():
    scores = logits(-np.inf, 1e30, -1e30, 3)
    assert kept({"temperature": 1e-300}, scores) == [0, 1, 2, 3]
    assert Sampler(SamplingOptions(temperature=1e-300)).sample(scores, []) == 1
    assert Sampler(SamplingOptions(temperature=1e30, seed=0)).sample(scores, []) != 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scores", [logits(1, np.nan, 2), logits(np.inf, 0), logits(-np.inf, -np.inf)])
def test_the_highest_logit_must_be_a_number(temperature, scores):
    with pytest.raises(NonFiniteError, match=r"is (nan|-?inf)"):
        Sampler(SamplingOptions(temperature=temperature)).sample(scores, [])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -0.1, "--temperature is -0.1; it must be 0 or more"),
        ("temperature", float("nan"), "--temperature is nan"),
        ("temperature", float("inf"), "--temperature is inf"),
        ("top_k", -1, "--top-k is -1; it must be a whole number"),
        ("top_k", 2.5, "--top-k is 2.5"),
        ("top_p", 0.0, "--top-p is 0.0; it must be above 0 and at most 1"),
        ("top_p", 1.1, "--top-p is 1.1"),
        ("min_p", -0.1, "--min-p is -0.1; it must be from 0 to 1"),
        ("min_p", 1.5, "--min-p is 1.5"),
        ("repetition_penalty", 0.0, "--repetition-penalty is 0.0; it must be above 0"),
        ("seed", -1, "--seed is -1; it must be a whole number, 0 or more"),
    ],
)
def test_refused_options(option, value, message):
    with pytest.raises(OptionError) as caught:
        SamplingOptions(**{option: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
