"""First floor: files, graphs, backends, models, audio and sessions. Knows no Hugging Face, no HTTP, no terminal.

from auricle.engine import load

with load("model.gguf") as model:
    for piece in model.stream("Transcribe the audio.", audio="speech.wav"):
        print(piece, end="", flush=True)
"""

from ..kernels.errors import AuricleError
from .answer import GenerateOptions, Result, Timings
from .segments import Segment
from .session import Model, Stream, load

__all__ = ["AuricleError", "GenerateOptions", "Model", "Result", "Segment", "Stream", "Timings", "load"]
