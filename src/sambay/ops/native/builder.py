"""Compiling the C++ kernels at first use into a per-user cache, and loading them from there.

The sources need no header of torch or Python, so one build serves any version of either. What is in
the cache is named by the hash of its content: a damaged file is noticed, removed and built anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sambay.files import WriteFailed, atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FLAGS = [
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    # Not -ffast-math: NaN must stay NaN, and linking with it changes how the whole process rounds.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-w",
]
# Tried in this order; compilers differ in which they know.
CPU_FLAGS = [["-march=native"], ["-mcpu=native"], []]
COMPILE_SECONDS = 300
REMEDY = "install one (for example: apt install g++) or name one in the environment variable CXX"

_log = logging.getLogger("sambay.ops")


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message says why in one line."""


def load() -> ctypes.CDLL:
    """The compiled kernels, built if the cache does not hold them intact.

    Raises:
        BuildError: no compiler, a compiler that fails, or a library that cannot be loaded.
    """
    if os.name != "posix":
        raise BuildError(f"the C++ kernels are not built on {platform.system()}")
    try:
        return _load()
    except OSError as error:
        raise BuildError(f"the C++ kernels cannot be built or loaded: {error}") from error


def _load() -> ctypes.CDLL:
    folder = cache_root() / _key(_compiler())
    path = _intact(folder)
    if path is not None:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    with _lock(folder), tempfile.TemporaryDirectory(prefix="sambay-native-") as scratch:
        path = _intact(folder)  # another process may have built it while this one waited
        if path is not None:
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # intact, but made for another system that shares this folder
                path.unlink(missing_ok=True)
        built = _compile(_compiler(), Path(scratch))
        content = built.read_bytes()
        cached = folder / f"kernels-{_digest(content)}.so"
        try:
            with atomic_write(cached) as file:
                file.write(content)
        except (WriteFailed, OSError) as error:
            _log.info("the compiled kernels are not kept: %s", error)
            cached = built  # once loaded, the file itself may go
        return ctypes.CDLL(str(cached))


def cache_root() -> Path:
    """The folder of all builds: $XDG_CACHE_HOME/sambay/native, or the same below ~/.cache."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured) / "sambay" / "native"
    home = os.path.expanduser("~")
    # Without a home nothing is kept: nothing can be created below the null device.
    return Path(home if os.path.isabs(home) else os.devnull) / ".cache" / "sambay" / "native"


def _compiler() -> list[str]:
    """The command of the C++ compiler, its first word an absolute path."""
    configured = shlex.split(os.environ.get("CXX", ""))
    for command in [configured] if configured else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    if configured:
        raise BuildError(f"CXX names '{configured[0]}', which is not a program; {REMEDY}")
    raise BuildError(f"there is no C++ compiler (c++, g++, clang++); {REMEDY}")


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _key(compiler: list[str]) -> str:
    """Changes whenever a build could come out differently: sources, flags, compiler, processor.

    The compiler is known by its file, not by running it, which would cost every start some
    milliseconds.
    """
    executable = Path(compiler[0]).resolve()
    status = executable.stat()
    parts = [str(executable), str(status.st_size), str(status.st_mtime_ns), *compiler[1:]]
    parts += [*FLAGS, *map(str, CPU_FLAGS), _processor()]
    for path in [*_sources(), *sorted(Path(__file__).parent.glob("*.h"))]:
        parts += [path.name, path.read_text()]
    return _digest("\0".join(parts).encode())


def _processor() -> str:
    """What decides the meaning of -march=native."""
    wanted = ("flags", "features", "model name", "cpu part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines: list[str] = []
        for line in file:
            if not line.strip() and lines:
                break  # the first processor is enough
            if line.lower().startswith(wanted):
                lines.append(line)
        return platform.machine() + "".join(lines)
    return platform.machine() + platform.processor()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _intact(folder: Path) -> Path | None:
    """The library in the folder whose content still is what its name says; others are removed."""
    for path in sorted(folder.glob("kernels-*.so")):
        with contextlib.suppress(OSError):
            if path.stem == f"kernels-{_digest(path.read_bytes())}":
                return path
            _log.warning("%s is damaged; building it again", path)
            path.unlink()
    return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by the one process that builds; without it (read-only or odd folders) several may."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = stack.enter_context(open(folder / "lock", "w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also by a kill
        yield


def _compile(compiler: list[str], scratch: Path) -> Path:
    began = time.monotonic()
    library = scratch / "kernels.so"
    failure = ""
    for cpu_flags in CPU_FLAGS:
        objects = [scratch / f"{source.stem}.o" for source in _sources()]
        commands = [
            [*compiler, *FLAGS, *cpu_flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(_sources(), objects, strict=True)
        ]
        link = [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]
        failure = _run(commands, scratch) or _run([link], scratch)
        if not failure:
            _log.info("built the C++ kernels in %.1f s", time.monotonic() - began)
            return library
    raise BuildError(f"the C++ compiler {shlex.join(compiler)} failed: {failure}")


def _run(commands: list[list[str]], folder: Path) -> str:
    """Runs the commands side by side; "" or the first line of what went wrong."""
    running: list[subprocess.Popen[str]] = []
    failure = ""
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
            )
        for process in running:
            _, complaint = process.communicate(timeout=COMPILE_SECONDS)
            if process.returncode and not failure:
                lines = [line for line in complaint.splitlines() if "error" in line.lower()]
                lines += complaint.splitlines()
                failure = lines[0].strip() if lines else f"exit status {process.returncode}"
    except OSError as error:
        failure = str(error)
    except subprocess.TimeoutExpired:
        failure = f"no result after {COMPILE_SECONDS} seconds"
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return failure
