"""What a card's run needs of recordings, as arrays: `card_pack.py SHARED DIR`, on a machine that can read sound.

The golden checkpoint with one recording and what the official code made of it, a quantised file of it, and the
recordings of the demonstration at 16 kHz.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from checkout import ROOT, link_auricle

CLIP, DEMO_CLIPS = "jfk_3s", ("george", "jackson", "yweweler")


def pack(shared: Path, out: Path) -> int:
    """Bytes that were written."""
    import numpy as np

    from auricle.convert.hf import convert, plan_conversion
    from auricle.engine.audio import load_audio

    golden = shared / "golden" / "a"
    (out / "checkpoint").mkdir(parents=True, exist_ok=True)
    for path in (golden / "checkpoint").iterdir():
        shutil.copyfile(path, out / "checkpoint" / path.name)
    shutil.copyfile(golden / f"{CLIP}.safetensors", out / f"{CLIP}.safetensors")
    np.save(out / f"{CLIP}.npy", load_audio(shared / "data" / "audio" / f"{CLIP}.wav"))
    for name in DEMO_CLIPS:
        np.save(out / f"{name}.npy", load_audio(ROOT / "tools" / "demo" / f"{name}.flac"))
    convert(plan_conversion(golden / "checkpoint", "q4_k"), out / "q4_k.gguf")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    shared, out = map(Path, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        link_auricle(Path(folder))
        n_bytes = pack(shared, out)
    print(f"{out}: {n_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
