"""A process that runs a model's code, or the tests that call it; see `code_sandbox`.

    python -s -S -P -B code_worker.py ROLE SANDBOX CPU_SECONDS MEMORY_MIB DESCRIPTORS PATHS

Two of them grade one completion. The role "solution" loads the code and answers calls; the role
"tests" runs the tests, in which each call of the code goes to the other process. What comes back is
data: None, booleans, numbers, texts, and lists, tuples, sets and dictionaries of these, made anew.
So nothing that the code defines, changes or ends is there where the verdict is found.

Both give up their rights before they read anything: namespaces without network, processes or files
(unless bwrap made them), a list of system calls that computing needs, and limits. Standard library
only, and nothing of this package: no more than this file is there.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import json
import os
import platform
import random
import resource
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 4 * 2**20
# Kinds of data that go from process to process as [kind, item, ...].
_BUILD: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": lambda items: iter(list(items)),
}
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 22, 24, 38
_EACCES = 13

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# The system calls that a Python program needs to compute, to import the standard library and to
# end, with their numbers on these two; besides them openat, to read.
_CALLS = """
read:0:63 write:1:64 close:3:57 fstat:5:80 newfstatat:262:79 statx:332:291 lseek:8:62 mmap:9:222
mprotect:10:226 munmap:11:215 mremap:25:216 madvise:28:233 brk:12:214 rt_sigaction:13:134
rt_sigprocmask:14:135 rt_sigreturn:15:139 sigaltstack:131:132 pread64:17:67 readv:19:65
writev:20:66 sched_yield:24:124 getcwd:79:17 sched_getaffinity:204:123 nanosleep:35:101
clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169
times:100:153 getrusage:98:165 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 uname:63:160 sysinfo:99:179 readlinkat:267:78
faccessat:269:48 faccessat2:439:439 getdents64:217:61 futex:202:98 getrandom:318:278
pselect6:270:72 ppoll:271:73 restart_syscall:219:128 exit:60:93 exit_group:231:94 stat:4:-
lstat:6:- poll:7:- access:21:- select:23:- readlink:89:- time:201:-
"""
_OPENAT = {"x86_64": 257, "aarch64": 56}


class SolutionError(Exception):
    """The code under test ended, broke the protocol, or raised what is no built-in error."""


def encode(value: Any) -> Any:
    """Return data as JSON can hold it.

    Raises:
        TypeError: It is not data.

    >>> encode([1, (2.5, "a"), {3: None}])
    ['list', 1, ['tuple', 2.5, 'a'], ['dict', [3, None]]]
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else ["int", hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    for kind in ("list", "tuple", "set", "frozenset"):
        if isinstance(value, getattr(builtins, kind)):
            return [kind, *map(encode, value)]
    if hasattr(value, "__iter__"):  # a generator, a range, the keys of a dictionary
        items = []
        for item in value:
            items.append(encode(item))
            if len(items) > MAX_MESSAGE:
                break
        return ["iterator", *items]
    raise TypeError(f"{type(value).__name__} is no data")


def decode(item: Any) -> Any:
    """Return what `encode` was given, of built-in types alone.

    >>> decode(encode({1: {2, 3}, "a": (10**30, b"b")}))
    {1: {2, 3}, 'a': (1000000000000000000000000000000, b'b')}
    """
    if not isinstance(item, list):
        if isinstance(item, dict):
            raise SolutionError("not a message")
        return item
    kind, *items = item
    if kind == "dict":
        return {decode(key): decode(value) for key, value in items}
    if kind == "int":
        return int(items[0], 16)
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "complex":
        return complex(*items)
    return _BUILD[kind](map(decode, items))


class Channel:
    """Messages to and from the other process, one JSON document a line."""

    def __init__(self) -> None:
        self._reader = os.fdopen(os.dup(0), "rb")
        self._writer = os.dup(1)

    def send(self, message: Any) -> None:
        """Write a message."""
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._writer, line) :]

    def receive(self) -> Any:
        """Return the next message; raise where there is none, or where it is too long."""
        line = self._reader.readline(MAX_MESSAGE)
        if not line.endswith(b"\n"):
            raise SolutionError("ended, or wrote too much")
        return json.loads(line)


def run_solution(channel: Channel) -> None:
    """Load the first program that can be loaded, and answer calls of its functions."""
    namespace: dict[str, Any] = {}
    for program in channel.receive():
        try:
            namespace = {"__name__": "solution"}
            exec(compile(program, "solution.py", "exec"), namespace)
            break
        except Exception:  # noqa: BLE001  whatever the code raises; another is tried
            continue
    else:
        return
    channel.send("loaded")
    while True:
        name, arguments, options = channel.receive()
        try:
            value = namespace[name](*decode(arguments), **decode(options))
            reply = ["value", encode(value)]
        except Exception as error:  # noqa: BLE001  the tests may expect it
            reply = ["raised", type(error).__name__]
        channel.send(reply)


def run_tests(channel: Channel, job: dict[str, Any]) -> bool:
    """Return whether the tests pass, all of them, having called the code."""
    num_calls = 0

    def calling(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            channel.send([name, encode(arguments), encode(options)])
            kind, value = channel.receive()
            if kind == "value":
                num_calls += 1
                return decode(value)
            error = getattr(builtins, value, None)
            if isinstance(error, type) and issubclass(error, Exception):
                num_calls += 1
                raise error
            raise SolutionError(value)

        return call

    channel.send(job["programs"])
    if channel.receive() != "loaded":
        return False
    namespace: dict[str, Any] = {"__name__": "tests"}
    for body in ("", "pass", "\n    pass"):  # what the tests use and the prompt defines
        try:
            exec(compile((job["prompt"] or "") + body, "prompt.py", "exec"), namespace)
            break
        except Exception:  # noqa: BLE001  a prompt need not be Python, nor run
            namespace = {"__name__": "tests"}
    for source in job["setup"]:
        exec(compile(source, "setup.py", "exec"), namespace)
    name: str | None = job["entry_point"]
    if name is not None:
        namespace[name] = calling(name)
    for source in job["tests"]:
        if name is None:
            names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
            for free in names - set(dir(builtins)) - set(namespace):
                namespace[free] = calling(free)
        exec(compile(source, "tests.py", "exec"), namespace)
    if name is not None and job["has_check"]:
        namespace["check"](namespace[name])
    return num_calls > 0


def _tests_pass(channel: Channel, job: dict[str, Any]) -> bool:
    try:
        return run_tests(channel, job)
    except BaseException:  # noqa: BLE001  a failing test; also one that ends the program
        return False


def enter_namespaces(paths: list[str]) -> None:
    """Go on in a process of its own without network, other processes, or any files but `paths`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def called(name: str, result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    uid, gid = os.getuid(), os.getgid()
    spaces = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    called("unshare", libc.unshare(spaces))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {uid} 1"),
        ("gid_map", f"65534 {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as written:
            written.write(text)
    if child := os.fork():  # the first process of the namespace: with it, all of them end
        os.closerange(0, 1024)
        os.waitpid(child, 0)
        os._exit(0)
    _prctl(_PDEATHSIG, 9)

    def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
        texts = [each.encode() if each else None for each in (source, target, kind, data)]
        called(f"mount {target}", libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))

    mount("none", "/", None, 0x4000 | 0x40000)  # recursive, private
    mount("tmpfs", _ROOT, "tmpfs", 2 | 4, "size=64k,mode=755")
    for path in paths:
        if os.path.islink(path):
            os.symlink(os.readlink(path), _ROOT + path)
            continue
        if os.path.isdir(path):
            os.makedirs(_ROOT + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(_ROOT + path), exist_ok=True)
            open(_ROOT + path, "w").close()
        mount(path, _ROOT + path, None, 0x1000 | 0x4000)  # bind, recursive
    attributes = struct.pack("4Q", 1 | 2 | 4, 0, 0, 0)  # read-only, no set-uid, no devices
    called(
        "mount_setattr",
        libc.syscall(442, -100, _ROOT.encode(), 0x8000, attributes, len(attributes)),
    )
    os.chdir(_ROOT)
    called("pivot_root", libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."))
    called("umount", libc.umount2(b".", 2))
    os.chdir("/")
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    called("capset", libc.capset(header, none))


_ROOT = "/proc"  # there is one everywhere, and it is to go
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    filled = [*arguments, 0, 0, 0, 0][:4]
    if libc.prctl(option, *map(ctypes.c_ulong, filled)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def filter_calls() -> None:
    """Refuse every system call that is not in the list, and every opening of a file to write."""
    machine = platform.machine()
    column = list(_ARCHITECTURES).index(machine) + 1
    numbers = [call.split(":")[column] for call in _CALLS.split()]
    load, equal, any_bit, verdict = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x50000 | _EACCES, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURES[machine]), (verdict, 0, 0, kill)]
    program += [(load, 0, 0, 0)]  # its number
    for number in numbers:
        if number != "-":
            program += [(equal, 0, 1, int(number)), (verdict, 0, 0, allow)]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    program += [(equal, 1, 0, _OPENAT[machine]), (verdict, 0, 0, refuse)]
    program += [(load, 0, 0, 32), (any_bit, 0, 1, writing), (verdict, 0, 0, refuse)]
    program += [(verdict, 0, 0, allow)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(buffer)))
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_SECCOMP, 2, ctypes.addressof(header))


def confine(sandbox: str, cpu_seconds: int, memory_mib: int, paths: list[str]) -> None:
    """Give up for good what computing does not need.

    Args:
        sandbox: "namespaces", "bwrap" (which has made them), or "none".
        cpu_seconds: Processor time.
        memory_mib: Address space, in MiB.
        paths: What of the file system is to be seen, for "namespaces".
    """
    if sys.platform == "linux":
        _prctl(_PDEATHSIG, 9)
        if sandbox == "namespaces":
            enter_namespaces(paths)
        _prctl(_DUMPABLE, 0)
    limits = {
        "CPU": cpu_seconds,
        "AS": memory_mib * 2**20,
        "FSIZE": 0,
        "NPROC": 0,
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        if (limit := getattr(resource, f"RLIMIT_{name}", None)) is None:
            continue
        try:
            resource.setrlimit(limit, (value, value))
        except (OSError, ValueError):  # macOS refuses to bound the address space
            if sandbox != "none":
                raise
    if sys.platform == "linux" and (sandbox != "none" or platform.machine() in _ARCHITECTURES):
        filter_calls()


def main() -> None:
    """Play one role to its end."""
    role, sandbox, cpu_seconds, memory_mib, own, *paths = sys.argv[1:]
    job_in, verdict_out = map(int, own.split(",")) if own else (-1, -1)
    warnings.simplefilter("ignore")
    channel = Channel()
    null = os.open("/dev/null", os.O_RDWR) if os.path.exists("/dev/null") else None
    for descriptor in (0, 1, 2):  # what the code prints goes nowhere
        if null is not None:
            os.dup2(null, descriptor)
    try:
        confine(sandbox, int(cpu_seconds), int(memory_mib), paths)
    except (OSError, KeyError, ValueError) as error:
        if role == "tests":
            os.write(verdict_out, f"E{error}".encode())
        return
    random.seed(0)  # a fork seeds it anew
    os.environ.clear()
    if role == "solution":
        channel.send("ready")
        run_solution(channel)
        return
    os.write(verdict_out, b"R")
    job = json.loads(os.fdopen(job_in, "rb").read())
    try:
        started = channel.receive() == "ready"
    except (SolutionError, ValueError):
        started = False
    verdict = "?" if not started else "1" if _tests_pass(channel, job) else "0"
    os.write(verdict_out, (job["token"] + verdict).encode())


if __name__ == "__main__":
    main()
