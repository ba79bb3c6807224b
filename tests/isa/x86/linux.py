"""Runs one statically linked x86-64 Linux program on an emulated Ice Lake, which has AVX-512 VNNI.

    linux.py SHIM ENTRY PROGRAM ARGUMENTS...

SHIM is shim.c as a library, ENTRY is entry.S as flat code. The CPU is Bochs's, from the package `bochscpu-python`; this is the
system around it, as far as a Rust test program needs one: memory, threads that take turns, time, and what it writes to its
standard output. It can read no file. The exit status is the program's; 139 says that it crashed, 70 that this file did.
"""

import array
import ctypes
import mmap
import os
import struct
import sys
import time
import traceback

ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
import bochscpu  # noqa: E402
import bochscpu.memory  # noqa: E402

PAGE = 4096
RAM = 1 << 30
# The system's own part of memory: its code, the registers of the thread that entered it, page tables, vector states.
CODE, SAVED, TABLES, VECTORS = 0x1000, 0x2000, 0x10000, 0x100000
ENTRY = CODE + 0x40
FIRST_USER = 0x200000
# The last level of the page tables, an entry of eight bytes for each page.
LEAVES = RAM - RAM // PAGE * 8
# Where the program's heap must end and its other mappings begin.
MAPPINGS = 0x8000000
STACK = 8 << 20

ENOENT, EAGAIN, ENOMEM, EINVAL, ENOTTY, ENOSYS, ETIMEDOUT = 2, 11, 12, 22, 25, 38, 110
RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R9, R10, R11 = range(12)

ram = mmap.mmap(-1, RAM)


def pages_up(size):
    return (size + PAGE - 1) & -PAGE


class Memory:
    """The program's address space: linear addresses are physical ones, and a page is there or not."""

    def __init__(self):
        base = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        for page in range(0, RAM, PAGE):
            bochscpu.memory.page_insert(page, base + page)
        struct.pack_into("<Q", ram, TABLES, TABLES + PAGE | 7)
        struct.pack_into("<Q", ram, TABLES + PAGE, TABLES + 2 * PAGE | 7)
        for i in range(RAM >> 21):
            struct.pack_into("<Q", ram, TABLES + 2 * PAGE + 8 * i, LEAVES + i * PAGE | 7)
        self.protect(PAGE, FIRST_USER - PAGE, 3)
        self.free = [(MAPPINGS, LEAVES)]
        self.changed = True

    def protect(self, at, size, bits):
        """Bits: 1 present, 2 writable, 4 the program's; 0 for what must not be touched."""
        last = pages_up(at + size)
        entries = array.array("Q", range(at | bits, last | bits, PAGE) if bits else [0] * ((last - at) // PAGE))
        ram[LEAVES + at // PAGE * 8 : LEAVES + last // PAGE * 8] = entries.tobytes()
        self.changed = True

    def take(self, size):
        size = pages_up(size)
        for i, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give_back(self, at, size):
        size = pages_up(size)
        ram[at : at + size] = bytes(size)
        self.protect(at, size, 0)
        joined = []
        for start, end in sorted(self.free + [(at, at + size)]):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self.free = joined


class Thread:
    def __init__(self, number, registers, fs, vectors):
        self.number, self.registers, self.fs, self.vectors = number, registers, fs, vectors
        self.clear_at_exit = 0
        # While it waits: the address, and when it stops waiting for it.
        self.word, self.deadline = None, None


def bits_of(protection):
    return 0 if protection == 0 else 5 | (protection & 2)


class Linux:
    def __init__(self, session, program, arguments):
        self.session = session
        self.memory = Memory()
        self.skipped = 0
        self.seen = set()
        self.vectors = list(range(VECTORS, FIRST_USER, PAGE))
        self.threads = 1
        self.load(program, arguments)

    def load(self, program, arguments):
        image = open(program, "rb").read()
        assert image[:4] == b"\x7fELF" and image[16:18] == b"\x02\x00", "a program at fixed addresses"
        entry, headers = struct.unpack_from("<QQ", image, 24)
        size, count = struct.unpack_from("<HH", image, 54)
        end = table = 0
        for i in range(count):
            kind, flags, offset, at, _, filed, used, _ = struct.unpack_from("<IIQQQQQQ", image, headers + i * size)
            if kind == 1:
                assert FIRST_USER <= at and at + used < MAPPINGS // 2, hex(at)
                ram[at : at + filed] = image[offset : offset + filed]
                self.memory.protect(at & -PAGE, used + (at & PAGE - 1), 7)
                end = max(end, pages_up(at + used))
                if offset <= headers < offset + filed:
                    table = at + headers - offset
        self.heap_start = self.heap = end
        stack = self.memory.take(STACK)
        self.memory.protect(stack, STACK, 7)
        top = stack + STACK

        def push(data):
            nonlocal top
            top -= len(data)
            ram[top : top + len(data)] = data
            return top

        random = push(os.urandom(16))
        strings = [push(text.encode() + b"\0") for text in [program] + arguments]
        chosen = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("CUPOLA_", "RUST_"))]
        environment = [push(text.encode() + b"\0") for text in chosen]
        # The program's headers, the size of a page, the entry, random bytes, the ticks of a second, and user 0 four times.
        auxiliary = [3, table, 4, size, 5, count, 6, PAGE, 9, entry, 25, random, 17, 100]
        auxiliary += [11, 0, 12, 0, 13, 0, 14, 0, 23, 0, 0, 0]
        words = [len(strings), *strings, 0, *environment, 0, *auxiliary]
        top &= -16
        if len(words) % 2:
            top -= 8
        push(struct.pack(f"<{len(words)}Q", *words))
        registers = [0] * 16
        registers[RCX], registers[RSP], registers[R11] = entry, top, 0x202
        self.current = Thread(1, registers, 0, self.new_vectors())
        self.ready, self.waiting = [], []
        self.lay()

    def new_vectors(self):
        at = self.vectors.pop(0)
        ram[at : at + PAGE] = bytes(PAGE)
        struct.pack_into("<I", ram, at + 24, 0x1F80)
        return at

    def lay(self):
        """Lays the current thread where entry.S goes on with it."""
        thread = self.current
        changed = int(self.memory.changed)
        struct.pack_into("<19Q", ram, SAVED, *thread.registers, thread.fs, thread.vectors, changed)
        self.memory.changed = False

    def entered(self):
        """A system call."""
        *registers, fs, _, _ = struct.unpack_from("<19Q", ram, SAVED)
        thread = self.current
        thread.registers, thread.fs = registers, fs
        number = registers[RAX]
        arguments = [registers[r] for r in (RDI, RSI, RDX, R10, R8, R9)]
        call = CALLS.get(number)
        if call is None:
            if number not in self.seen:
                self.seen.add(number)
                print(f"linux.py: system call {number} is answered with ENOSYS", file=sys.stderr)
            result = -ENOSYS
        else:
            result = call(self, *arguments)
        if result is not None:
            thread.registers[RAX] = result & 0xFFFF_FFFF_FFFF_FFFF
        self.lay()

    def crashed(self, vector, code):
        cpu = self.session.cpu
        print(f"linux.py: exception {vector}, code {code:#x}, in thread {self.current.number}: rip {cpu.rip:#x}, "
              f"address {cpu.cr2:#x}, rsp {cpu.rsp:#x}, rax {cpu.rax:#x}", file=sys.stderr)
        leave(139)

    # Threads take turns: they change where one waits, yields, or asks for the time, as one does that spins.

    def now(self):
        return time.monotonic_ns() + self.skipped

    def switch(self):
        for waiting in [t for t in self.waiting if t.deadline is not None and t.deadline <= self.now()]:
            self.time_out(waiting)
        if not self.ready:
            timed = [t for t in self.waiting if t.deadline is not None]
            if not timed:
                print("linux.py: every thread waits for another one", file=sys.stderr)
                leave(70)
            first = min(timed, key=lambda t: t.deadline)
            self.skipped += max(0, first.deadline - self.now())
            self.time_out(first)
        self.current = self.ready.pop(0)

    def time_out(self, thread):
        self.waiting.remove(thread)
        thread.registers[RAX] = 0 if thread.word is None else -ETIMEDOUT & 0xFFFF_FFFF_FFFF_FFFF
        self.ready.append(thread)

    def sched_yield(self, *_):
        self.current.registers[RAX] = 0
        self.ready.append(self.current)
        self.switch()

    def clock_gettime(self, clock, at, *_):
        now = self.now() + (1_700_000_000 * 10**9 if clock == 0 else 0)
        struct.pack_into("<QQ", ram, at, *divmod(now, 10**9))
        self.sched_yield()

    def wait(self, word, deadline):
        self.current.word, self.current.deadline = word, deadline
        self.waiting.append(self.current)
        self.switch()

    def nanosleep(self, _clock, _flags, at, *_):
        seconds, rest = struct.unpack_from("<QQ", ram, at)
        self.wait(None, self.now() + seconds * 10**9 + rest)

    def futex(self, word, operation, value, timeout, *_):
        command = operation & 0x7F
        if command in (0, 9):
            if struct.unpack_from("<I", ram, word)[0] != value & 0xFFFF_FFFF:
                return -EAGAIN
            deadline = None
            if timeout:
                seconds, rest = struct.unpack_from("<QQ", ram, timeout)
                deadline = seconds * 10**9 + rest
                if command == 0:
                    deadline += self.now()
                elif operation & 0x100:
                    deadline -= 1_700_000_000 * 10**9
            return self.wait(word, deadline)
        if command in (1, 10):
            return self.wake(word, value)
        return -ENOSYS

    def wake(self, word, count):
        woken = [t for t in self.waiting if t.word == word][:count]
        for thread in woken:
            self.waiting.remove(thread)
            thread.registers[RAX] = 0
            self.ready.append(thread)
        return len(woken)

    def clone3(self, at, size, *_):
        flags, _, child_tid, parent_tid, _, stack, stack_size, tls = struct.unpack_from("<8Q", ram, at)
        return self.start(flags, stack + stack_size, parent_tid, child_tid, tls)

    def clone(self, flags, stack, parent_tid, child_tid, tls, *_):
        return self.start(flags, stack, parent_tid, child_tid, tls)

    def start(self, flags, stack, parent_tid, child_tid, tls):
        assert flags & 0x10000, "a thread, not a process"
        self.threads += 1
        registers = list(self.current.registers)
        registers[RAX], registers[RSP] = 0, stack
        thread = Thread(self.threads, registers, tls, self.new_vectors())
        ram[thread.vectors : thread.vectors + PAGE] = ram[self.current.vectors : self.current.vectors + PAGE]
        for flag, where in ((0x100000, parent_tid), (0x1000000, child_tid)):
            if flags & flag:
                struct.pack_into("<I", ram, where, thread.number)
        thread.clear_at_exit = child_tid if flags & 0x200000 else 0
        self.ready.append(thread)
        return thread.number

    def exit(self, code, *_):
        thread = self.current
        if not self.ready and not self.waiting:
            leave(code & 0xFF)
        if thread.clear_at_exit:
            struct.pack_into("<I", ram, thread.clear_at_exit, 0)
            self.wake(thread.clear_at_exit, 1)
        self.vectors.append(thread.vectors)
        self.switch()

    def exit_group(self, code, *_):
        leave(code & 0xFF)

    def set_tid_address(self, at, *_):
        self.current.clear_at_exit = at
        return self.current.number

    def gettid(self, *_):
        return self.current.number

    def tgkill(self, _group, _thread, signal, *_):
        print(f"linux.py: the program ends itself with signal {signal}", file=sys.stderr)
        leave(128 + signal)

    def arch_prctl(self, what, value, *_):
        if what != 0x1002:
            return -EINVAL
        self.current.fs = value
        return 0

    # Memory.

    def brk(self, end, *_):
        if self.heap_start <= end < MAPPINGS:
            old, self.heap = self.heap, end
            if end > old:
                self.memory.protect(old & -PAGE, end - (old & -PAGE), 7)
            else:
                first = pages_up(end)
                ram[first : pages_up(old)] = bytes(pages_up(old) - first)
                self.memory.protect(first, pages_up(old) - first, 0)
        return self.heap

    def mmap(self, at, size, protection, flags, _file, _offset):
        if not flags & 0x20:
            return -EINVAL
        if flags & 0x10:
            ram[at : at + pages_up(size)] = bytes(pages_up(size))
        else:
            at = self.memory.take(size)
            if at is None:
                return -ENOMEM
        self.memory.protect(at, pages_up(size), bits_of(protection))
        return at

    def munmap(self, at, size, *_):
        self.memory.give_back(at, size)
        return 0

    def mprotect(self, at, size, protection, *_):
        self.memory.protect(at, size, bits_of(protection))
        return 0

    def mremap(self, *_):
        return -ENOMEM

    def madvise(self, at, size, advice, *_):
        if advice == 4:
            ram[at : at + pages_up(size)] = bytes(pages_up(size))
        return 0

    # The rest.

    def write(self, file, at, size, *_):
        if file not in (1, 2):
            return -EINVAL
        return os.write(file, ram[at : at + size])

    def writev(self, file, vectors, count, *_):
        return sum(self.write(file, *struct.unpack_from("<QQ", ram, vectors + 16 * i)) for i in range(count))

    def poll(self, at, count, *_):
        for i in range(count):
            struct.pack_into("<H", ram, at + 8 * i + 6, 0)
        return 0

    def getrandom(self, at, size, *_):
        ram[at : at + size] = os.urandom(size)
        return size

    def sched_getaffinity(self, _thread, size, at, *_):
        struct.pack_into("<Q", ram, at, 0b11)
        return 8

    def prlimit(self, _process, _what, _new, old, *_):
        if old:
            struct.pack_into("<QQ", ram, old, STACK, STACK)
        return 0

    def nothing(self, *_):
        return 0

    def no_file(self, *_):
        return -ENOENT

    def no_terminal(self, *_):
        return -ENOTTY

    def unknown(self, *_):
        return -ENOSYS


CALLS = {
    1: Linux.write, 7: Linux.poll, 9: Linux.mmap, 10: Linux.mprotect, 11: Linux.munmap, 12: Linux.brk,
    13: Linux.nothing,  # rt_sigaction
    14: Linux.nothing,  # rt_sigprocmask
    16: Linux.no_terminal, 20: Linux.writev, 24: Linux.sched_yield, 25: Linux.mremap, 28: Linux.madvise,
    39: Linux.gettid, 56: Linux.clone, 60: Linux.exit, 79: Linux.no_file, 89: Linux.no_file,
    131: Linux.nothing,  # sigaltstack
    158: Linux.arch_prctl, 186: Linux.gettid, 202: Linux.futex, 204: Linux.sched_getaffinity, 218: Linux.set_tid_address,
    228: Linux.clock_gettime, 230: Linux.nanosleep, 231: Linux.exit_group, 234: Linux.tgkill, 257: Linux.no_file,
    262: Linux.no_file, 267: Linux.no_file,
    273: Linux.nothing,  # set_robust_list
    302: Linux.prlimit, 318: Linux.getrandom, 332: Linux.no_file,
    334: Linux.unknown,  # rseq
    435: Linux.clone3,
    157: Linux.nothing,  # prctl: names of threads
}


def leave(code):
    """At once: the module does not survive its own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guarded(handler):
    def call(*arguments):
        try:
            handler(*arguments)
        except BaseException:
            traceback.print_exc()
            leave(70)

    return call


def segment(selector, attributes):
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.base, segment.limit = True, selector, 0, 0xFFFF_FFFF
    segment.attr = attributes
    return segment


def main():
    code = open(sys.argv[2], "rb").read()
    ram[CODE : CODE + len(code)] = code
    session = bochscpu.Session()
    session.missing_page_handler = guarded(lambda page: sys.exit(f"linux.py: no memory at {page:#x}"))
    linux = Linux(session, sys.argv[3], sys.argv[4:])
    state = bochscpu.State()
    # Paging with write protection; 64-bit mode with `syscall`; vector state, fs base, and XSAVE for the program.
    state.cr0, state.cr3, state.cr4, state.efer, state.xcr0 = 0x8001_0033, TABLES, 0x5_0620, 0xD01, 1
    state.rip, state.rflags, state.mxcsr, state.mxcsr_mask = CODE, 2, 0x1F80, 0xFFFF
    state.star, state.lstar, state.sfmask = 0x18 << 48 | 0x8 << 32, ENTRY, 0x4_7700
    state.cs = segment(0x8, 0x209B)
    for name in ("ss", "ds", "es", "fs", "gs"):
        setattr(state, name, segment(0x10, 0xC093))
    session.cpu.state = state
    hook = bochscpu.Hook()
    hook.wrmsr = guarded(lambda *_: linux.entered())
    hook.exception = guarded(lambda _session, _cpu, vector, code: linux.crashed(vector, code))
    session.run([hook])
    leave(70)


main()
