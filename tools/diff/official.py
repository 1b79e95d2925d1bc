"""A checkout of the official code as the other side, run by `tools/oracle/official.py` in a process of its own.

That process may be another Python with other versions of everything. Stages come through a pipe as they are
computed; the process waits while one is compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...convert.checkpoint import open_checkpoint
from .checkpoint import RESIDENT_BYTES, checkpoint_formats
from .request import BLOCK_ROWS, GENERATED, IDS, MEL, Array, Blocks, DiffError, Emit, Request

RUNNER = Path(__file__).parent.parent / "oracle" / "official.py"
MODEL_CODE = Path("src") / "modeling_moss_audio.py"


class Official:
    """`python`: the interpreter that has the checkout's requirements; None takes the checkout's own `.venv`, else ours.
    `stages`: what is no op, to know whether values inside stages are wanted."""

    has_ops = True
    rounds = frozenset()

    def __init__(
        self, checkout: Path, checkpoint: Path, stages: Sequence[str], time_markers: bool, python: Path | None = None
    ) -> None:
        if not (checkout / MODEL_CODE).is_file():
            raise DiffError(f"{checkout} has no {MODEL_CODE}; give a checkout of the official repository")
        own = checkout / ".venv" / "bin" / "python"
        self._python = python or (own if own.is_file() else Path(sys.executable))
        self._paths, self._stages, self._time_markers = (checkout, checkpoint), set(stages), time_markers
        self.formats = checkpoint_formats(checkpoint)
        with open_checkpoint(checkpoint) as source:
            self._places = {n: (str(t.file), t.dtype, t.shape, t.offset) for n, t in source.tensors.items()}
        self.about: dict[str, Any] = {"kind": "official", "path": str(checkout), "checkpoint": str(checkpoint)}

    def trace(self, request: Request, wanted: Sequence[str], emit: Emit) -> None:
        asked = {
            "clips": [len(clip) for clip in request.clips],
            "prompt": request.prompt,
            "n_new": request.n_new if GENERATED in wanted else 0,
            "time_markers": self._time_markers if request.time_markers is None else request.time_markers,
            "ops": any(name not in self._stages and name not in (MEL, IDS) for name in wanted if ".logits" not in name),
            "resident_bytes": RESIDENT_BYTES,
            "tensors": self._places,
        }
        asked["ops"] = asked["ops"] and GENERATED not in wanted
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [self._python, RUNNER, *self._paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
            sender = threading.Thread(target=_send, args=(process.stdin, asked, request.clips), daemon=True)
            sender.start()
            try:
                ended = self._read(process.stdout, emit)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
                sender.join()
            if not ended:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
                raise DiffError(
                    f"the official code stopped: {said[-1].strip()} (run with {self._python}; if that lacks what "
                    f"{self._paths[0]} requires, name another with --official-python)"
                )

    def _read(self, pipe: BinaryIO, emit: Emit) -> bool:
        """Passes stages on; whether the last line came."""
        while line := pipe.readline():
            frame = json.loads(line)
            if frame.pop("end", False):
                self.about |= frame
                return True
            value = _receive(pipe, np.dtype(frame["dtype"]), tuple(frame["shape"]), frame["name"] == "logits")
            emit(frame["name"], value, "all")
            if isinstance(value, Blocks):
                for _ in value.blocks:  # what nobody wanted is in the pipe all the same
                    pass
        return False


def _send(pipe: BinaryIO, asked: dict[str, Any], clips: Sequence[np.ndarray]) -> None:
    with suppress(BrokenPipeError), pipe:
        pipe.write(json.dumps(asked).encode() + b"\n")
        for clip in clips:
            pipe.write(np.ascontiguousarray(clip, np.float32).tobytes())


def _receive(pipe: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], in_blocks: bool) -> Array:
    row = shape[1:] if in_blocks else shape

    def read(n: int) -> np.ndarray:
        size = n * int(np.prod(row, dtype=np.int64)) * dtype.itemsize
        data = pipe.read(size)
        if len(data) < size:
            raise DiffError("the official code stopped in the middle of a stage; is there enough memory?")
        return np.frombuffer(data, dtype)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], BLOCK_ROWS):
            n = min(BLOCK_ROWS, shape[0] - start)
            yield read(n).reshape(n, *row)

    return Blocks(shape, blocks()) if in_blocks else read(1).reshape(shape)
