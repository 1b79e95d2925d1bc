"""The GPU kernels one by one: on a GPU timed beside PyTorch's, and without one compiled and looked at.

    python benchmarks/kernels.py --static --save              # any machine: registers, spills, loads, tensor cores
    python benchmarks/kernels.py --save                       # a GPU: times by shape, type and number of tokens
    python benchmarks/kernels.py --tune --types Q4_K Q6_K     # a GPU: which tiles are fastest, into kernels/gpu/tuned

`--static` compiles every case that a module in kernels/gpu lists, for four processors, and reads the machine code; the
table is kept with the hashes of the sources it is of, one for each minor version of Triton. Times: see
`kernel_times.py`. The last line is one JSON document (with `--static --json` a list of rows).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from auricle.kernels.errors import AuricleError

__version__ = "0"  # for libraries that ask whether a package of this name is installed: it is not


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--static", action="store_true", help="compile and read, without a GPU")
    parser.add_argument("--tune", action="store_true", help="measure configurations and keep the fastest")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression for NAME TYPE")
    parser.add_argument("--archs", type=int, nargs="+", help="processors for --static: 80 89 90 120")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile for --static")
    parser.add_argument("--shapes", nargs="+", choices=("4b", "8b"), default=("4b", "8b"))
    parser.add_argument("--types", nargs="+", help="of weights; by default those with a tile decoder")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 2, 4, 8, 64, 512))
    parser.add_argument("--seconds", type=float, default=0.05, help="for a case, and as much for each peer")
    parser.add_argument("--json", action="store_true", help="the last line of --static is JSON")
    parser.add_argument("--save", action="store_true", help="keep the document in benchmarks/results/")
    a = parser.parse_args(arguments)
    if a.static and a.save and (a.only or a.archs):
        parser.error("the table that --static --save keeps is whole: leave out --only and --archs")
    return a


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with status 2 and one line where there is no GPU, and with 1 where something is found wrong."""
    a = parse_arguments(arguments)
    try:
        if a.static:
            from kernel_static import run
        elif a.tune:
            from kernel_tune import run
        else:
            from kernel_times import run
        sys.exit(run(a))
    except AuricleError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
