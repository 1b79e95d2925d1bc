"""What is said when a model file is cut short while its pages are read: the system ends the process with SIGBUS then.

Python's own handlers run between two instructions, and the one that failed never ends, so this one is machine code.
Without llvmlite it is faulthandler's, which says which signal it was.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
from functools import cache
from pathlib import Path
from typing import Any

STATUS = 3  # the model file, see app.py

HANDLER = r"""
declare i64 @write(i32, i8*, i64)
declare void @_exit(i32)
@line = private constant [{n} x i8] c"{text}"
define void @handler(i32 %signal) {{
  %start = getelementptr [{n} x i8], [{n} x i8]* @line, i64 0, i64 0
  %written = call i64 @write(i32 2, i8* %start, i64 {n})
  call void @_exit(i32 {status})
  unreachable
}}
"""


def say_when_cut(path: Path) -> None:
    """From now on a page of `path` that is not there any more ends the program with one line and the status 3."""
    if not hasattr(signal, "SIGBUS"):
        return
    name = str(path) if str(path).isprintable() else ascii(str(path))
    line = f"auricle: {name} was cut short while it was in use; fetch or convert it again\n"
    try:
        code = compile_handler(line)
    except ImportError:
        faulthandler.enable()
        return
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGBUS, code.get_function_address("handler"))


@cache
def compile_handler(line: str) -> Any:
    """An engine with the function `handler`; it must live as long as that may be called. Raises ImportError."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    raw = line.encode(errors="backslashreplace")
    source = HANDLER.format(n=len(raw), text="".join(f"\\{byte:02x}" for byte in raw), status=STATUS)
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(source), machine)
    engine.finalize_object()
    return engine
