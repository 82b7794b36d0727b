"""Reads what a cubin says of its kernel: the device constant NAME_info (cuda::KernelInfo in cuda/params.h), without a driver."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import CompileError

_SECTION = struct.Struct(
    "<IIQQQQIIQQ"
)  # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, addralign, entsize
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym: name, info, other, section, value, size
_KERNEL_INFO = struct.Struct("<5i")
_SHT_SYMTAB = 2


@dataclass(frozen=True)
class KernelInfo:
    """abi : of the sources. threads : in a CTA. shared_bytes : dynamic. ctas_per_sm : of a persistent kernel, or 0.
    tile_keys : of an attention kernel, or 0.
    """

    abi: int
    threads: int
    shared_bytes: int
    ctas_per_sm: int
    tile_keys: int


def kernel_info(cubin: bytes, name: str) -> KernelInfo:
    """The constant NAME_info in `cubin`. Raises CompileError where the bytes are no cubin or hold no such kernel."""
    try:
        data = _symbol_bytes(cubin, f"{name}_info".encode())
    except (struct.error, IndexError) as error:
        raise CompileError(f"the cubin of {name} ({len(cubin)} bytes) is not whole: build it again") from error
    if data is None:
        raise CompileError(f"the cubin of {name} ({len(cubin)} bytes) holds no constant {name}_info: build it again")
    return KernelInfo(*_KERNEL_INFO.unpack(data[: _KERNEL_INFO.size]))


def code(cubin: bytes, name: str) -> bytes:
    """Machine code of kernel `name`; empty where the cubin has no such kernel. Raises CompileError where it is not whole."""
    try:
        return _symbol_bytes(cubin, name.encode()) or b""
    except (struct.error, IndexError) as error:
        raise CompileError(f"the cubin of {name} ({len(cubin)} bytes) is not whole: build it again") from error


def code_bytes(cubin: bytes, name: str) -> int:
    """Bytes of machine code of kernel `name`; 0 where the cubin has no such kernel. Raises CompileError where it is not whole."""
    return len(code(cubin, name))


def _symbol_bytes(cubin: bytes, wanted: bytes) -> bytes | None:
    if cubin[:5] != b"\x7fELF\x02":
        return None
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [_SECTION.unpack_from(cubin, table + i * entry_size) for i in range(count)]
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != _SHT_SYMTAB:
            continue
        names = sections[link][4]
        for at in range(offset, offset + size, _SYMBOL.size):
            name, _, _, section, value, length = _SYMBOL.unpack_from(cubin, at)
            start = names + name
            if cubin[start : cubin.index(b"\0", start)] == wanted:
                start = sections[section][4] + value
                return cubin[start : start + length]
    return None
