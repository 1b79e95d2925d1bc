"""The likeliest continuation of many prompts at once, for error rates during training. Slow, simple: no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .batches import Row, collate
from .model import Trainee, to_tensors


@torch.inference_mode()
def continue_greedily(trainee: Trainee, rows: Sequence[Row], n_new: int) -> list[list[int]]:
    """At most `n_new` ids for each row, without the one that ends an answer. The rows grow."""
    batch = to_tensors(collate(rows), trainee.device)
    encoded, taps = trainee.encode(batch)
    answers: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    for _ in range(n_new):
        batch = to_tensors(collate(rows), trainee.device)
        ends = torch.tensor([len(row.ids) for row in rows], device=trainee.device).cumsum(0) - 1
        ids = trainee.model.lm_head(trainee.decode(batch, encoded, taps, ends)).argmax(-1).tolist()
        for at in sorted(open_rows):
            if ids[at] == rows[at].codec.end_id:
                open_rows.discard(at)
            else:
                answers[at].append(ids[at])
                rows[at].tokens([ids[at]])
        if not open_rows:
            break
    return answers


def count_errors(heard: Sequence[str], said: Sequence[str]) -> int:
    """Levenshtein's distance: the fewest words to insert, delete and replace."""
    costs = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        diagonal, costs[0] = costs[0], i
        for j, other in enumerate(said, 1):
            diagonal, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, diagonal + (word != other))
    return costs[-1]
