"""The worker of `peers.py` that runs this engine: `peer_auricle.py MODEL THREADS BACKEND`."""

from __future__ import annotations

import sys
import time

import numpy as np
from turns import serve

from auricle.engine import load
from auricle.engine.memory import peak_bytes
from auricle.engine.prompts import Prompt
from auricle.tools.bench import CLIP_SECONDS, SAMPLE_RATE, decode_steps, fill_cache, make_speech, run_round


class Ours:
    """The tasks, over one open model."""

    def __init__(self, path: str, threads: int, backend: str) -> None:
        self.model = load(path, threads=threads, backend=backend)
        self.filled = 0

    def _prefill(self, ids: list[int]) -> np.ndarray:
        prompt = Prompt(np.array(ids, np.int32), np.full(len(ids), -1, np.int32))
        return self.model.runtime.prefill(prompt, [])

    def clip(self, n_new: int) -> dict[str, float]:
        found = run_round(self.model, make_speech(CLIP_SECONDS), SAMPLE_RATE, n_new)
        return {"first_token_s": found.first_token_s, "real_time_factor": found.real_time_factor}

    def prefill(self, n_tokens: int) -> float:
        """Tokens a second."""
        ids = list(range(1000, 1000 + n_tokens))
        start = time.perf_counter()
        self._prefill(ids)
        return n_tokens / (time.perf_counter() - start)

    def decode(self, context: int, n_new: int) -> float:
        """Tokens a second after `context` tokens."""
        if context > self.filled:
            fill_cache(self.model, context)
            self.filled = context
        logits = self.model.runtime.decode(1000, context)
        _, _, steps = decode_steps(self.model, logits, context + 1, n_new + 1)
        return n_new / sum(steps)

    def logits(self, ids: list[int], every: int) -> list[float]:
        """Of the last token, each `every`-th."""
        return self._prefill(ids)[::every].tolist()

    def peak(self) -> int:
        return peak_bytes()


def main() -> None:
    ours = Ours(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    serve({name: getattr(ours, name) for name in ("clip", "prefill", "decode", "logits", "peak")})


if __name__ == "__main__":
    main()
