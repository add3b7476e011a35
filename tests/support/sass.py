"""The machine code of a kernel for Hopper, and a fault of its assembler.

Operands of warp-group MMAs in shared memory are named by descriptors of 64 bits. For every step
along K ptxas adds to a descriptor, and where it adds both halves apart the upper one is a constant
plus a register that is to hold zero. ptxas 12.8 (Triton 3.6 and 3.7) sometimes takes one that has
been written since, such as half of an address: the MMA then reads anything.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;")
UPPER_HALF = re.compile(r"UIADD3\.X UR\d+, (UR\d+), -?0x[0-9a-f]{7,8}, URZ")
WRITE = re.compile(r"(?:@!?U?P\w+ )?(\S+) (?:UP\d, )?UR(\d+)\b(.*)")


def machine_code(binary: Any, folder: Path) -> str:
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def wrong_descriptors(code: str) -> list[str]:
    """Instructions that add the upper half of a descriptor to what is not zero."""
    zeros: set[int] = set()
    found = []
    for instruction in (" ".join(text.split()) for text in INSTRUCTION.findall(code)):
        upper = UPPER_HALF.match(instruction)
        if upper and int(upper[1][2:]) not in zeros:
            found.append(instruction)
        if write := WRITE.match(instruction):
            operation, register, rest = write[1], int(write[2]), write[3]
            written = {register, register + 1} if re.search("64|WIDE", operation) else {register}
            if operation.startswith("UMOV") and rest == ", URZ":
                zeros |= written
            else:
                zeros -= written
    return found
