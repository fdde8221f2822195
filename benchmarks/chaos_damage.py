"""The ways in which the files of a checkpoint are damaged, and whether that is noticed."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from minbert.trainer.checkpoint.format import MANIFEST, Damaged, read_manifest, verify

NOTICED, MISSED = "noticed", "missed"
SAME = "the same manifest"


def truncate(path: Path, rng: random.Random) -> str:
    size = rng.randrange(1, path.stat().st_size)
    os.truncate(path, size)
    return f"to {size} bytes"


def flip_bit(path: Path, rng: random.Random) -> str:
    content, place = bytearray(path.read_bytes()), rng.randrange(8 * path.stat().st_size)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bit {place}"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def empty(path: Path, rng: random.Random) -> str:
    os.truncate(path, 0)
    return "emptied"


# Each says what it did.
DAMAGE: dict[str, Callable[[Path, random.Random], str]] = {
    "truncated": truncate,
    "bit flipped": flip_bit,
    "removed": remove,
    "emptied": empty,
}


def damage_and_look(path: Path, kind: str, rng: random.Random) -> tuple[str, str]:
    """Damage a file of a checkpoint, verify the checkpoint, and mend the file: what was done, and if it was noticed.

    It is noticed if the only complaint names the file. JSON can say the same in several ways (without the last line
    break; 1E-05 for 1e-05): such a manifest is as good as before.
    """
    checkpoint, content = path.parent, path.read_bytes()
    intact = read_manifest(checkpoint)
    how = DAMAGE[kind](path, rng)
    try:
        manifest = read_manifest(checkpoint)
        complaints = verify(checkpoint, manifest)
        if path.name == MANIFEST and manifest == intact and not complaints:
            return how, SAME
    except Damaged as damage:
        complaints = [str(damage)]
    finally:
        path.write_bytes(content)
    return how, NOTICED if len(complaints) == 1 and str(path) in complaints[0] else MISSED
