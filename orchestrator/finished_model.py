"""The folder of the compressed model: written, reloaded, compared, put in place and copied."""

from collections.abc import Callable, Mapping
from pathlib import Path

from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.publish import publish
from moesaic.orchestrator.stated_dtype import dtype_change
from moesaic.orchestrator.verifier import VerifierProcess

# Tokens that the written folder is compared on.
_SEQUENCES, _LENGTH = 2, 64


def finish_model(
    experiment: Experiment,
    view: View,
    pieces: Mapping[str, Path],
    card: str,
    folder: Path,
    unneeded: Callable[[], None],
) -> None:
    """Makes the checkpoint; it is reloaded and compared before it takes the place of an earlier
    one.

    Args:
        pieces: unit → its piece; other units stay as they are.
        card: text of its README.md.
        folder: where it will be.
        unneeded: lets go of the workers, once a process of its own is on its way.

    Raises:
        RunError: what was written does not compute what the pieces say; it is removed.
    """
    recipe = experiment.recipe
    view.stage("assemble", 2)

    with VerifierProcess() as verifier:

        def check(written: Path) -> None:
            view.advance("assemble")
            _compare(experiment, view, verifier, written, folder, pieces)

        unneeded()
        source, serve = experiment.folder, recipe.serve
        assemble(experiment.model, source, pieces, serve, folder, card, check=check)
    release_pins()
    view.advance("assemble")
    if recipe.publish is not None:
        done = "copied" if publish(folder, recipe.publish) else "is there already"
        view.line(f"{recipe.publish}: {done}")


def _compare(
    experiment: Experiment,
    view: View,
    verifier: VerifierProcess,
    written: Path,
    folder: Path,
    pieces: Mapping[str, Path],
) -> None:
    """Compares what is ``written`` with the pieces; ``folder`` is where it is to be."""
    import torch

    ids = torch.from_numpy(experiment.evaluation.beginning(_SEQUENCES, _LENGTH))
    serve, checkpoint = experiment.recipe.serve, experiment.model.checkpoint
    try:
        difference = verifier.verify(written, checkpoint, pieces, serve, ids.long())
    except RunError as error:
        reason = str(error).replace(str(written), str(folder))
        earlier = "; the earlier one is still there" if folder.exists() else ""
        raise RunError(f"{reason}; what was written is removed{earlier}") from error
    outputs = experiment.model.family.yardstick.outputs
    view.line(f"{folder}: reloaded, {outputs} differ by {difference:.1e} of their scale")
    if changed := dtype_change(checkpoint, written):
        view.line(changed)
