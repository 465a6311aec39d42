"""Verification in a process of its own, which has loaded no more than a user's would have."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.process import SLEEPING_THREADS, collect_rarely, leave

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.orchestrator.checkpoint import Checkpoint
    from moesaic.orchestrator.targets import Serve

# glibc returns what was as large as this when it is freed, instead of keeping it for itself; what
# it keeps is shared by all threads.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}

# It starts, reads both sides, makes them dense and runs some tokens: more than ten times what that
# takes on a slow disk.
_SECONDS, _BYTES_PER_SECOND = 3600.0, 10e6
# A process that was killed is gone, unless the system waits for a disk.
_END_SECONDS = 10.0


class VerifierProcess:
    """:func:`~moesaic.orchestrator.verify.verify` elsewhere.

    A context manager: the process starts, and imports what it needs, before there is anything to
    verify.
    """

    def __init__(self) -> None:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-m", "moesaic.orchestrator.verifier"]
        environment = {**os.environ, **SLEEPING_THREADS, **_GIVES_BACK}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def __enter__(self) -> "VerifierProcess":
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=_END_SECONDS)

    def verify(
        self,
        folder: Path,
        checkpoint: "Checkpoint",
        chosen: Mapping[str, Path | None],
        serve: "Serve",
        ids: "Tensor",
    ) -> float:
        """As :func:`verify`, once.

        Raises:
            RunError: as there, or the process died, or gave no answer in the time that so many
                bytes may take.
        """
        request = {
            "folder": str(folder),
            "model": str(checkpoint.path),
            "chosen": {name: None if path is None else str(path) for name, path in chosen.items()},
            "serve": serve,
            "ids": ids.tolist(),
        }
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        seconds = _SECONDS + (checkpoint.file_bytes + written) / _BYTES_PER_SECOND
        try:
            answer, said = self._process.communicate(json.dumps(request), timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{folder}: the process that reloads it gave no answer in {seconds:.0f} s; look"
                " whether the disk answers, and run the same command again"
            ) from None
        if self._process.returncode != 0:
            lines = said.strip().splitlines()
            reason = (
                lines[-1] if lines and self._process.returncode > 0 else "killed: out of memory?"
            )
            raise RunError(f"{folder}: the process that reloads it ended ({reason})")
        found = json.loads(answer)
        if "error" in found:
            raise RunError(found["error"])
        return float(found["difference"])


def _answer() -> NoReturn:
    """What a :class:`VerifierProcess` does: a request on stdin, an answer on stdout."""
    collect_rarely()
    with contextlib.redirect_stdout(sys.stderr):
        answer = _verified()
    print(json.dumps(answer))
    leave(0)


def _verified() -> dict[str, Any]:
    """Imports what it needs while the request is still being written."""
    import compressed_tensors  # noqa: F401
    import torch

    from moesaic.orchestrator.remote_model import open_checkpoint
    from moesaic.orchestrator.verify import verify

    request = json.load(sys.stdin)
    chosen = {name: path and Path(path) for name, path in request["chosen"].items()}
    try:
        original, ids = open_checkpoint(Path(request["model"])), torch.tensor(request["ids"])
        found = verify(Path(request["folder"]), original, chosen, request["serve"], ids)
    except (RunError, UserError) as error:
        return {"error": str(error)}
    return {"difference": found}


if __name__ == "__main__":
    _answer()
