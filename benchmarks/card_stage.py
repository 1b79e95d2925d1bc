"""One process of `card.py`: `card_stage.py STAGE --results FILE …` goes through the steps of a stage.

Nothing of the project is imported before the link to the checkout is there and it is known whether kernels are
interpreted: Triton decides that when it is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from card_steps import Journal, Step, run_steps
from checkout import link_auricle


def list_steps(a: argparse.Namespace) -> Iterator[tuple[str, Step]]:
    """The steps of a stage, which imports what it needs."""
    from card_device import find_device

    if a.stage == "work":
        from card_kernels import count_work

        yield "work", count_work
        return
    gpu = find_device(a.rehearse)
    if a.stage == "facts":
        from card_kernels import fact_steps

        yield from fact_steps(gpu)
    elif a.stage == "cases":
        from card_cases import case_steps

        yield from case_steps(gpu, a.golden, a.work)
    elif a.stage == "kernels":
        from card_kernels import time_steps

        yield from time_steps(gpu)
    elif a.stage in ("make", "requests", "start"):
        import card_requests

        if a.stage == "make":
            yield from card_requests.make_steps(gpu, a.model, a.recipe)
        elif a.stage == "requests":
            yield from card_requests.Requests(gpu, a.model).steps()
        else:
            yield from card_requests.start_steps(gpu, a.model, a.started)
    elif a.stage in ("peer", "compile-peer", "compiled-peer"):
        from card_peer import peer_steps

        yield from peer_steps(gpu, a.model, a.stage)
    elif a.stage == "profile":
        from card_profile import Profiles

        yield from Profiles(gpu, a.model).steps()
    elif a.stage in ("tune-check", "tune"):
        import card_tune

        steps = card_tune.check_steps if a.stage == "tune-check" else card_tune.time_steps
        yield from steps(gpu, a.work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--claims", type=Path, required=True, help="a folder, the same for all who share the steps")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--started", type=float, default=0.0)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--rehearse", action="store_true")
    a = parser.parse_args()
    if a.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        sys.argv.append("--card")  # to the cases of the tests
    link_auricle(a.work / "path")
    journal = Journal(a.results, a.claims)
    if a.stage == "pytest":
        from card_cases import run_pytest

        sys.exit(run_pytest(journal, a.rehearse))
    run_steps(dict(list_steps(a)), journal)


if __name__ == "__main__":
    main()
