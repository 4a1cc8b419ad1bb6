#!/usr/bin/env python3
"""A client of nfqd's rings, made from the layout in the documentation of the crate nfqd-shmctl (module ring).

    ring_client.py REGION COMMAND...     send commands, print a reply a line; exit 1 if one was rejected
    ring_client.py REGION -              the same, with commands from standard input, a line each
    ring_client.py REGION --counters     print the page of counters

REGION is the memory of the ivshmem device, /sys/bus/pci/devices/ADDRESS/resource2, or the file of a region.
"""

import fcntl
import mmap
import os
import struct
import sys
import time

HEADER = struct.Struct("<8s8I4Q")
SLOT = struct.Struct("<QIIQ")
SLOTS = 16
MORE, FIRST = 1, 2


class Ring:
    def __init__(self, path, timeout=10.0):
        self.deadline = time.monotonic() + timeout
        self.file = open(path, "r+b", buffering=0)
        size = os.fstat(self.file.fileno()).st_size
        self.memory = mmap.mmap(self.file.fileno(), size)
        magic, version, self.slot_size, slots, self.guest, self.requests, self.replies, self.counters, _ = (
            HEADER.unpack_from(self.memory, 4096)[:9]
        )
        if (magic, version, slots) != (b"NFQDRING", 1, SLOTS):
            sys.exit(f"{path}: no rings of version 1")
        self.epoch = None

    # Slices of 8 bytes are copied as a whole, and in the order of the program on x86.
    def number(self, offset):
        return int.from_bytes(self.memory[offset : offset + 8], "little")

    def store(self, offset, number):
        self.memory[offset : offset + 8] = struct.pack("<Q", number % 2**64)

    def host(self):
        reset = self.number(4160)
        return self.number(4136), self.number(4144), self.number(4152), reset

    def own(self):
        return self.number(self.guest), self.number(self.guest + 8), self.number(self.guest + 16)

    def withdraw(self):
        if self.own()[0] == self.host()[3]:
            self.store(self.guest, self.own()[0] + 1)

    def wait(self, condition):
        while not condition():
            if time.monotonic() > self.deadline:
                sys.exit("no answer from the host")
            time.sleep(0.0002)

    def take_over(self):
        fcntl.flock(self.file, fcntl.LOCK_EX)  # other clients of this guest wait
        epoch, taken, written, followed = self.host()
        reset, sent, consumed = self.own()
        if reset == followed and sent == taken and consumed == written:
            self.epoch = epoch
            return
        if not (reset == followed and taken == written == epoch and sent < epoch):
            self.withdraw()
            self.wait(lambda: self.host()[3] == self.own()[0])
        self.epoch = self.host()[0]
        self.store(self.guest + 16, self.epoch)
        self.store(self.guest + 8, self.epoch)

    def slot(self, ring, number):
        return ring + (number - self.epoch - 1) % SLOTS * self.slot_size

    def send(self, commands):
        """Yields a reply for each command, with at most a ring full of them under way."""
        if any(len(command) > 2046 for command in commands):
            sys.exit("a command has at most 2046 bytes")
        self.take_over()
        try:
            yield from self.exchange(commands)
        except BaseException:
            self.withdraw()
            raise

    def exchange(self, commands):
        for start in range(0, len(commands), SLOTS):
            part = commands[start : start + SLOTS]
            sent = self.own()[1]
            for number, command in enumerate(part, sent + 1):
                text = command.encode("ascii")
                at = self.slot(self.requests, number)
                self.memory[at : at + 24 + len(text)] = SLOT.pack(number, len(text), 0, 0) + text
            self.store(self.guest + 8, sent + len(part))
            for number in range(sent + 1, sent + len(part) + 1):
                yield self.receive(number)

    def receive(self, expected):
        text = b""
        while True:
            number = self.own()[2] + 1
            at = self.slot(self.replies, number)
            self.wait(
                lambda: self.host()[0] != self.epoch
                or 0 < self.host()[2] - number + 1 <= SLOTS
                and self.number(at) == number
            )
            if self.host()[0] != self.epoch:
                sys.exit("the host reset the rings; the command may or may not have taken effect")
            _, length, flags, request = SLOT.unpack_from(self.memory, at)
            if flags & FIRST:
                text = b""
            text += self.memory[at + 24 : at + 24 + length]
            self.store(self.guest + 16, number)
            if request != expected:
                sys.exit(f"a reply to request {request} instead of {expected}")
            if not flags & MORE:
                return text.decode("ascii", "replace")

    def page(self):
        before = self.number(self.counters)
        page = self.memory[self.counters : self.counters + 4096]
        is_good = before % 2 == 0 and self.number(self.counters) == before
        return page if is_good and page[8:16] != bytes(8) else None

    def middleboxes(self):
        self.store(self.guest + 24, self.number(self.guest + 24) + 1)  # have them kept up to date
        pages = []
        self.wait(lambda: pages.append(self.page()) or pages[-1])
        page = pages[-1]
        for entry in range(min(63, struct.unpack_from("<I", page, 16)[0])):
            mac, _, *numbers = struct.unpack_from("<6sH4Q2I", page, 64 + 64 * entry)
            names = ("packets", "bytes", "denied", "redirected", "backends", "dead")
            yield mac.hex(":"), dict(zip(names, numbers))


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    ring = Ring(sys.argv[1], float(os.environ.get("RING_TIMEOUT", "10")))
    if sys.argv[2] == "--counters":
        for mac, numbers in ring.middleboxes():
            print(mac, *(f"{name} {number}" for name, number in numbers.items()))
        return 0
    commands = sys.stdin.read().splitlines() if sys.argv[2] == "-" else sys.argv[2:]
    rejected = False
    for reply in ring.send(commands):
        print(reply)
        rejected |= not reply.startswith("OK")
    return int(rejected)


if __name__ == "__main__":
    sys.exit(main())
