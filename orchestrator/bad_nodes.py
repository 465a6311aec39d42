"""Nodes whose workers must not work, or cannot be made: which node it is, and why."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import actors

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.head import interruptible
from moesaic.orchestrator.worker import installed

# The label by which Ray knows a node.
_LABEL = "ray.io/node-id"
# Characters shown of what Ray tells of a death.
_CAUSE = 300
_FRAME = re.compile(r'\s+File ".*", line \d+, in ')
_ERROR = re.compile(r"[\w.]*Error: ")
_NAMES_OF_ACTOR = re.compile(
    r"^The actor died unexpectedly before finishing this task\. "
    r"(?:(?:class_name|actor_id|pid|name|namespace|ip): \S+ )*"
)


def elsewhere(nodes: Iterable[str]) -> dict[str, str]:
    """The ``label_selector`` of an actor that may be on any node but these."""
    return {_LABEL: f"!in({','.join(sorted(nodes))})"}


def node_of(actor: Any) -> str:
    """Id of the node where Ray has put an actor, dead or alive.

    Returns:
        empty where it has none yet, or the driver is no part of the cluster (``ray://``) and cannot
        know.
    """
    if ray.util.client.ray.is_connected():
        return ""
    about = interruptible(lambda: actors(actor_id=actor._actor_id.hex()))
    node: str = about.get("Address", {}).get("NodeID", "")
    return node if node.strip("f") else ""


def host_of(node: str) -> str:
    """Name of a node's machine."""
    names = {n["NodeID"]: n["NodeManagerHostname"] for n in interruptible(ray.nodes)}
    return str(names.get(node) or node)


def why_failed(text: str) -> str:
    """What was raised when a worker was made: it stands behind the last frame of a traceback.

    Where all frames are Ray's, which it leaves out, it is the last line that names an error.
    """
    lines = text.splitlines()
    frames = [n for n, line in enumerate(lines) if _FRAME.match(line)]
    if frames:
        raised = list(itertools.dropwhile(lambda line: line[:1].isspace(), lines[frames[-1] + 1 :]))
    else:
        raised = [line for line in lines if _ERROR.match(line)][-1:]
    return _shortened(" ".join(" ".join(raised or lines).split()))


def why_dead(text: str) -> str:
    """What Ray says of the death of an actor, in a sentence.

    Its message begins with the actor's names and numbers; the cause may be followed by pages of
    advice.
    """
    cause = re.search(r"(The actor (?:is dead|died) because .*?)(?:\. |$)", text)
    found = cause[1] if cause else _NAMES_OF_ACTOR.sub("", text)
    return _shortened(found.partition(" Some common causes include")[0].rstrip("."))


def _shortened(text: str) -> str:
    return text if len(text) <= _CAUSE else f"{text[:_CAUSE].rpartition(' ')[0]} …"


def check_installed(there: Mapping[str, str]) -> None:
    """Results of different code must not be mixed, and keys of entries tell only the driver's.

    Raises:
        RunError: a worker answered from a node with another version than this process has.
    """
    here = installed()

    def compare(name: str) -> None:
        if there[name] != here[name]:
            raise RunError(
                f"node {there['host']} has {name} {there[name]}, this process has {here[name]}:"
                " install the same version on all machines"
            )

    compare("moesaic")
    if there["code"] != here["code"]:
        raise RunError(
            f"node {there['host']} has other sources of moesaic {here['moesaic']} (digest"
            f" {there['code'][:8]}) than this process ({here['code'][:8]}): install the same on all"
            " machines, and start again what was started before a change"
        )
    compare("torch")
    compare("transformers")
