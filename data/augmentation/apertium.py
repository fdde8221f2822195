"""Apertium behind EasyNMT's seam: a rule-based translator of Debian, without weights and without a network.

A pipeline of small programs per direction stays open. Each sentence ends with a NUL, at which all of them forget what
came before, so that a translation depends on its sentence alone.
"""

import contextlib
import hashlib
import os
import re
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError

DATA = Path("/usr/share/apertium")
# Apertium's directions are called by ISO 639-3.
LANGUAGES = {"en": "eng", "es": "spa", "ca": "cat", "fr": "fra", "pt": "por", "it": "ita", "gl": "glg", "eu": "eus"}
LANGUAGES |= {"de": "deu", "nl": "nld", "sv": "swe", "da": "dan", "nb": "nob", "nn": "nno", "eo": "epo", "is": "isl"}

SILENCE = 60.0  # seconds without an answer after which the programs count as dead

_ESCAPED = re.compile(r"([\\^$/\[\]{}@<>])")  # of the stream format
_END = "[][\n]"  # a blank after the sentence, without which its last full stop is lost


class Apertium:
    """The translator called `apertium`. Words that it does not know are marked on the way back to `language`: `*word`
    is unknown, `@word` has no counterpart, `#word` no inflected form."""

    name = "apertium"
    samples = False
    on_gpu = False

    def __init__(self, language: str):
        self.language = language

    def revision(self, source: str, target: str) -> str:
        """SHA-256 of the rules and dictionaries of a direction. Raises UserError if it is not installed."""
        direction = self.direction(source, target)
        mode = DATA / "modes" / f"{direction}.mode"
        pipeline = mode.read_text()
        digest = hashlib.sha256(pipeline.encode())
        for name in re.findall(r"'([^']+)'", pipeline):
            digest.update(Path(name).read_bytes())
        return digest.hexdigest()

    def direction(self, source: str, target: str) -> str:
        """Such as eng-spa, of languages by either code. Raises UserError if it is not installed."""
        source, target = (LANGUAGES.get(code, code) for code in (source, target))
        if not shutil.which("apertium"):
            raise UserError(f"Apertium is not installed: apt-get install apertium apertium-{source}-{target}")
        if not (DATA / "modes" / f"{source}-{target}.mode").exists():
            there = sorted(path.stem for path in (DATA / "modes").glob("*.mode") if path.stem.count("-") == 1)
            pivots = [name for name in there if name.startswith(f"{source}-") and "_" not in name]
            raise UserError(
                f"Apertium has no direction {source}-{target} here; from {source} it has "
                f"{', '.join(pivots) or 'none'}. `apt-cache search ^apertium-` lists the packages; give another "
                "--pivot, or a neural --translator"
            )
        return f"{source}-{target}"

    def open(self) -> "ApertiumTranslator":
        return ApertiumTranslator(self)


class ApertiumTranslator:
    """The object that EasyNMT calls."""

    def __init__(self, model: Apertium):
        self.model = model
        self._pipes: dict[str, _Pipe] = {}

    def translate_sentences(
        self, sentences: Sequence[str], source_lang: str, target_lang: str, device: str = "cpu", **options: Any
    ) -> list[str]:
        direction = self.model.direction(source_lang, target_lang)
        if direction not in self._pipes:
            self._pipes[direction] = _Pipe(direction, marks=target_lang == self.model.language)
        return self._pipes[direction](sentences)

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.close()
        self._pipes.clear()


class _Pipe:
    """One direction's programs, started when they are needed. They run without the script `apertium`, which holds back
    what it has not seen the end of."""

    def __init__(self, direction: str, marks: bool):
        mode = str(DATA / "modes" / f"{direction}.mode")
        made = subprocess.run(["apertium-wblank-mode", "-z", mode], capture_output=True, text=True, check=True)
        # The shell keeps no end of the output: when one of the programs dies, that ends.
        script = f"exec 3<&0; {made.stdout.strip().replace(' | ', ' <&3 | ', 1)} & exec >&- 3<&-; wait"
        self.command = ["bash", "-c", script, direction, "-g" if marks else "-n", ""]
        self.process: subprocess.Popen | None = None

    def __call__(self, sentences: Sequence[str]) -> list[str]:
        """A translation for each; "" for one that the programs cannot take."""
        found: list[str] = []
        while len(found) < len(sentences):
            answers = self._ask(sentences[len(found) :])
            found += answers
            if len(found) < len(sentences):  # they died: of the sentence whose answer is the first to lack
                (alone,) = self._ask(sentences[len(found) : len(found) + 1]) or [""]
                found.append(alone)
        return found

    def _ask(self, sentences: Sequence[str]) -> list[str]:
        """The answers, up to the one of which the programs die, or over which they fall silent."""
        process = self._start()
        assert process.stdout is not None
        output = process.stdout.fileno()
        written = b"".join(f"{_escape(sentence)}{_END}".encode() + b"\0" for sentence in sentences)
        writer = threading.Thread(target=_write, args=(process.stdin, written), daemon=True)
        writer.start()
        answers: list[str] = []
        rest = b""
        while len(answers) < len(sentences):
            ready, _, _ = select.select([output], [], [], SILENCE)
            read = os.read(output, 1 << 16) if ready else b""
            if not read:
                self.close()
                writer.join()
                return answers[: answers.index("")] if "" in answers else answers  # at their end they write NULs
            *whole, rest = (rest + read).split(b"\0")
            answers += [_unescape(answer.decode(errors="replace")) for answer in whole]
        writer.join()
        return answers

    def _start(self) -> subprocess.Popen:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for us to handle
            )
        return self.process

    def close(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # all its programs
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        self.process = None


def _write(stream: Any, content: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the programs died, which the reader sees
        stream.write(content)
        stream.flush()


def _escape(sentence: str) -> str:
    return _ESCAPED.sub(r"\\\1", " ".join(sentence.replace("\0", " ").split()))


def _unescape(answer: str) -> str:
    answer = answer.replace("[]", "")
    answer = re.sub(r"(?<!\\)\[\s*\]", " ", answer)
    return " ".join(re.sub(r"\\(.)", r"\1", answer).split())
