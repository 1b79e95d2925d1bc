"""The worker of `peers.py` that runs llama.cpp, in a Python that has llama_cpp.

    python peer_llama.py MODEL THREADS N_CTX FLASH(0 or 1)

Works on llama.cpp's own interface, without the Python layer above it. A long context is made from a block of 512
computed tokens, whose keys and values are copied and turned to the positions they stand for: the same amount of memory
with contents as good, in a fraction of the time.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp as L
import numpy as np
from turns import serve

BLOCK = 512


@L.llama_log_callback
def say_nothing(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """What is logged while the clock runs."""


class Llama:
    """The tasks, over one model."""

    def __init__(self, path: str, threads: int, n_ctx: int, flash: bool) -> None:
        L.llama_backend_init()
        params = L.llama_model_default_params()
        params.n_gpu_layers = 0
        model = L.llama_model_load_from_file(path.encode(), params)
        assert model, f"llama.cpp cannot load {path}"
        self.n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
        params = L.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, BLOCK, BLOCK
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        self.context = L.llama_init_from_model(model, params)
        assert self.context, "llama.cpp made no context"
        self.memory = L.llama_get_memory(self.context)
        self.filled = 0
        L.llama_log_set(say_nothing, ctypes.c_void_p(0))

    def _run(self, ids: list[int], position: int) -> np.ndarray:
        """Appends tokens to sequence 0; gives the logits after the last one."""
        for start in range(0, len(ids), BLOCK):
            part = ids[start : start + BLOCK]
            batch = L.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, position + start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = start + i + 1 == len(ids)
            status = L.llama_decode(self.context, batch)
            L.llama_batch_free(batch)
            assert status == 0, f"llama_decode gave {status}"
        return np.ctypeslib.as_array(L.llama_get_logits_ith(self.context, -1), (self.n_vocab,))

    def _fill(self, context: int) -> None:
        """Makes sequence 0 the positions 0 to context - 1."""
        if self.filled >= context:
            L.llama_memory_seq_rm(self.memory, 0, context, -1)
            self.filled = context
            return
        L.llama_memory_clear(self.memory, True)
        self._run(list(range(1000, 1000 + min(context, BLOCK))), 0)
        if context > BLOCK:
            self._repeat(context)
        self.filled = context

    def _repeat(self, context: int) -> None:
        size = L.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        assert L.llama_state_seq_get_data(self.context, state, size, 0) == size, "the block was not read"
        L.llama_memory_clear(self.memory, True)
        for start in range(0, context, BLOCK):
            assert L.llama_state_seq_set_data(self.context, state, size, 1), "the block was not written"
            L.llama_memory_seq_add(self.memory, 1, 0, -1, start)
            L.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            L.llama_memory_seq_rm(self.memory, 1, -1, -1)
        L.llama_memory_seq_rm(self.memory, 0, context, -1)
        last = L.llama_memory_seq_pos_max(self.memory, 0)
        assert last == context - 1, f"the cache ends at {last}"

    def prefill(self, n_tokens: int) -> float:
        """Tokens a second."""
        L.llama_memory_clear(self.memory, True)
        self.filled = 0
        start = time.perf_counter()
        self._run(list(range(1000, 1000 + n_tokens)), 0)
        return n_tokens / (time.perf_counter() - start)

    def decode(self, context: int, n_new: int) -> float:
        """Tokens a second after `context` tokens."""
        self._fill(context)
        token = int(self._run([1000], context).argmax())
        start = time.perf_counter()
        for i in range(n_new):
            token = int(self._run([token], context + 1 + i).argmax())
        seconds = time.perf_counter() - start
        L.llama_memory_seq_rm(self.memory, 0, context, -1)
        return n_new / seconds

    def logits(self, ids: list[int], every: int) -> list[float]:
        """Of the last token, each `every`-th."""
        L.llama_memory_clear(self.memory, True)
        self.filled = 0
        return self._run(ids, 0)[::every].tolist()

    def about(self) -> dict[str, str]:
        return {"version": L.__version__, "system": L.llama_print_system_info().decode().strip()}

    def peak(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    llama = Llama(sys.argv[1], *map(int, sys.argv[2:5]))
    serve({name: getattr(llama, name) for name in ("prefill", "decode", "logits", "about", "peak")})


if __name__ == "__main__":
    main()
