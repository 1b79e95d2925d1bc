"""How kernels are compiled and where the results are kept.

numba's own cache looks at one source file; a kernel here is made of several (the vocabulary, a tile decoder, the
kernel), so its stamp is a hash of all of them, and of the vector instructions in use. Knows no kernel.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from .. import formats
from .isa import find_level, processor

CACHE_VARIABLE = "AURICLE_CACHE"
KEPT_DAYS = 30  # since the last use of a version of the kernels
STAMP_LENGTH = 16
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp", "afn"}}

log = logging.getLogger("auricle.kernels")


class _Part(JITCodeLibrary):
    """A function that a kernel is made of. It stays as it was emitted: only the whole kernel is optimised and becomes
    machine code, where numba would do both for each part, and three times for what `prange` runs."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0  # nobody calls it

    @property
    def codegen(self) -> Any:
        return _Nowhere


class _Nowhere:
    """In place of the code generator of a part: there is no machine code that could be told its environment."""

    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        pass


class _KernelCompiler(Compiler):
    """Compiles everything that is called for the first time by a kernel as parts of it."""

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        maker = self.state.targetctx.codegen()
        self.state.library = JITCodeLibrary(maker, function.__qualname__)
        self.state.library.enable_object_caching()
        usual, maker._library_class = maker._library_class, _Part
        try:
            return super().compile_extra(function)
        finally:
            maker._library_class = usual


# For functions that kernels are made of: they become part of their callers.
inline = njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)


def kernel(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at its first call and keeps the result on disk. In a parallel one `prange` uses all threads;
    in another it is a plain loop."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(parallel=parallel, no_cfunc_wrapper=True, pipeline_class=_KernelCompiler, **OPTIONS)(function)
        compiled._cache = Cache(function)
        return compiled

    return decorate


def specialise(template: Callable[..., Any], name: str, *, parallel: bool = False, **given: Any) -> Any:
    """A kernel made from `template` with some of the globals it names replaced: its tile decoder, a group length.

    The result is compiled as a function of its own, called `name` after the template's name.
    """
    function = FunctionType(template.__code__, {**template.__globals__, **given}, f"{template.__name__}_{name}")
    function.__qualname__, function.__module__ = function.__name__, template.__module__
    function.__doc__ = template.__doc__
    return kernel(parallel)(function)


def prepare() -> None:
    """Loads what numba would load when the first kernel is called, a quarter of a second; throws away kernels of
    versions that are no longer used."""
    with global_compiler_lock:  # two models may be opened at once
        cpu_target.typing_context.refresh()
        cpu_target.target_context.refresh()
    folder = cache_folder()
    if folder is not None:
        sweep(folder, fingerprint())


_scheduler = threading.RLock()  # numba's own


def one_at_a_time() -> AbstractContextManager[Any]:
    """To hold while parallel kernels run: a lock for the whole process where numba has nothing but its own scheduler,
    which ends a process whose threads start two at once; with OpenMP and TBB nothing."""
    numba.set_num_threads(numba.get_num_threads())  # starts the threads; before that numba does not know which they are
    return _scheduler if numba.threading_layer() == "workqueue" else nullcontext()


def sweep(folder: Path, current: str) -> None:
    """Removes the folders of kernels that nobody has used for KEPT_DAYS; `current` is marked as used now."""
    with suppress(OSError):  # it may not be there yet, or be another user's
        os.utime(folder / current)
        for other in folder.iterdir():
            if is_stamp(other.name) and time.time() - other.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)


def is_stamp(name: str) -> bool:
    return len(name) == STAMP_LENGTH and set(name) <= set("0123456789abcdef")


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: AURICLE_CACHE, or a folder of the user's. None where the user has no home, as in
    a container that knows no such user."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "auricle"
    found = os.path.expanduser("~")
    return Path(found) / ".cache" / "auricle" if os.path.isabs(found) else None


@cache
def fingerprint() -> str:
    """Of all that a compiled kernel depends on; two processors that share a home have a folder each."""
    return stamp([*Path(__file__).parent.glob("*.py"), Path(formats.__file__)], " ".join((find_level(), *processor())))


def stamp(sources: Iterable[Path], level: str) -> str:
    """Changes with any of the source files, with the compiler, and with the level of vector instructions."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {level}".encode())
    for path in sorted(sources):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:STAMP_LENGTH]


class _Folder(_CacheLocator):
    """Tells numba where the kernels lie and when they are out of date."""

    def __init__(self, function: Callable[..., Any], path: str) -> None:
        self._py_file = path

    def get_cache_path(self) -> str:
        return str((cache_folder() or Path()) / fingerprint())

    def get_source_stamp(self) -> str:
        return fingerprint()

    def get_disambiguator(self) -> None:
        return None

    @classmethod
    def from_function(cls, function: Callable[..., Any], path: str) -> _Folder:
        return cls(function, path)


class _Impl(CompileResultCacheImpl):
    _locator_classes = (_Folder,)


class _Files(IndexDataCacheFile):
    """The two files of a function: which signatures are where, and what was compiled. Each begins with a checksum of
    the rest: a file that was cut short or changed counts as missing, since numba would run what is in it."""

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, overloads)

    def _load_index(self) -> dict[Any, str]:
        return self._read(self._index_path) or {}

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))

    def _write(self, path: str, value: Any) -> None:
        data = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(data).digest() + data)

    def _read(self, path: str) -> Any:
        try:
            content = Path(path).read_bytes()
        except OSError:
            return None
        checksum, data = content[:32], content[32:]
        return pickle.loads(data) if hashlib.sha256(data).digest() == checksum else None


class Cache(FunctionCache):
    """numba's cache of one function, in our folder; a folder that cannot be written is reported once and done without.
    Compilation is announced, since it takes seconds."""

    _impl_class = _Impl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, fingerprint())
        if cache_folder() is None:
            self.disable()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None:
            announce(self._py_func.__name__)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._enabled:
            complain("this user has no home", "~/.cache/auricle")
            return
        try:
            super().save_overload(sig, data)
        except OSError as error:
            complain(error.strerror or str(error), self._cache_path)


@cache
def complain(reason: str, folder: str) -> None:
    """Once for a reason and a folder: the errors themselves name a different file each."""
    log.warning(
        "compiled kernels cannot be kept in %s (%s); set %s to a folder that can be written",
        folder,
        reason,
        CACHE_VARIABLE,
    )


def announce(name: str) -> None:
    log.info("compiling %s (once for this machine)", name)
