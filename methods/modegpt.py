"""MoDeGPT: an MLP, an attention or experts made narrower module by module, without new parameters.

Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression, 2408.09632. The
matrices of a module are cut together, each kind by the decomposition that suits it (section 3.2):

*MLP*, and every expert on its own: Nyström's approximation of what down reads (see
:mod:`moesaic.methods.nystrom`; algorithm 1), channels by ridge leverage.

*Queries and keys*: a CR decomposition (algorithm 2). Of every head the channels with the largest
‖C^½ W_Q[:, i]‖·‖C^½ W_K[:, i]‖ stay, C = Σ x xᵀ. Rotary embeddings turn channels i and i + d/2
together, so pairs of them stay or go (appendix B.4), with the norm of both; query heads that share
a key head share its channels, with the norm of all of them. Where queries and keys pass a norm of
their own before they meet, they stay whole: the event ``queries_kept`` says so.

*Values and outputs*: the SVD of C^½ W_V W_O per head (algorithm 3), of the stacked W_O of all query
heads that share a value head. With W_O stacked = Q R (QR), U the leading eigenvectors of
R W_V C W_Vᵀ Rᵀ is all that it takes: W_V' = Uᵀ R W_V and W_O' = Q U; nothing is inverted.

Everything is float64. The loss of a cut is predicted from the errors of down, of queries and of
outputs, each of the inputs that it really has; for outputs these are attended values.
"""

import torch
from torch import Tensor

from moesaic.methods import nystrom, slim
from moesaic.methods.base import Event, MethodOptions, option
from moesaic.methods.grid import check_finite
from moesaic.methods.low_rank import experts_hessian
from moesaic.methods.parts import Narrowed, Part, PartReduction, PartShape, RoleShapes, whole
from moesaic.methods.reduction import ExpertLayer, LayerShape, Outline, Reduction

NEEDS = slim.NEEDS
PARTS = frozenset({"mlp", "attention"})


class Options(MethodOptions):
    """Options of modegpt."""

    SHOWN = ("keep",)

    keep: float = option(
        0.8,
        "share that stays of the channels of an MLP, of every expert, and of every head",
        [0.9, 0.8, 0.7, 0.6, 0.5],
        gt=0,
        le=1,
    )
    multiple: int = option(
        32,
        "the new width stays a multiple of this as far as the old one is one, so that quantization"
        " groups still divide it",
        ge=1,
    )
    head_multiple: int = option(
        8, "the same for the channels of a head, of which there are an even number", ge=2
    )
    # As in slim: C + λI has a condition number of at most 1 + channels / ridge.
    ridge: float = option(
        0.01,
        "ridge of the refit and of leverage scores, relative to the mean of diag C",
        [1e-3, 1e-2, 1e-1],
        ge=1e-8,
    )


# Experts


def _slim(shape: LayerShape, options: Options) -> slim.Options:
    return slim.Options(
        width=_width(shape.width, options),
        multiple=options.multiple,
        channels="leverage",
        ridge=options.ridge,
    )


def outline(shape: LayerShape, options: Options) -> Outline:
    """All experts, narrower."""
    return slim.outline(shape, _slim(shape, options))


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Cuts and refits one expert after another."""
    return slim.reduce(layer, _slim(layer.shape, options))


# Dense parts


def outline_part(shape: PartShape, options: Options) -> RoleShapes:
    """Narrower linears; see the module's docstring for which."""
    found = dict(shape.shapes)
    if shape.kind == "mlp":
        hidden, width = found["down"]
        kept = _width(width, options)
        for role in found.keys() & {"gate", "up"}:
            found[role] = (kept, found[role][1])
        found["down"] = (hidden, kept)
        return found
    values = _head(shape.value_channels, options)
    found["value"] = (shape.kv_heads * values, found["value"][1])
    found["output"] = (found["output"][0], shape.heads * values)
    if shape.paired:
        kept = _head(shape.head_channels, options)
        found["query"] = (shape.heads * kept, found["query"][1])
        found["key"] = (shape.kv_heads * kept, found["key"][1])
    return found


def _width(width: int, options: Options) -> int:
    return nystrom.kept_channels(width, options.keep, options.multiple, "keep")


def _head(channels: int, options: Options) -> int:
    kept = nystrom.kept_channels(channels, options.keep, options.head_multiple, "keep")
    if kept % 2:
        raise ValueError(
            f"keep: {options.keep:g} of the {channels} channels of a head is {kept}, an odd number:"
            " give an even head_multiple that divides them"
        )
    return kept


def reduce_part(part: Part, options: Options) -> PartReduction:
    """Cuts an MLP or an attention.

    Raises:
        ValueError: a weight or a Hessian is NaN or infinite, or ``keep`` leaves an odd head.
    """
    for role, weight in part.weights.items():
        check_finite(role, weight)
    for role, stats in part.stats.items():
        try:
            experts_hessian(stats, 0)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from error
    if part.shape.kind == "mlp":
        return _mlp(part, options)
    linears = _values(part, _head(part.shape.value_channels, options))
    sizes = {role: part.shape.shapes[role][1] for role in ("value", "output")}
    events = [event for role, size in sizes.items() for event in _few_tokens(part, role, size)][:1]
    if part.shape.paired:
        linears |= _queries(part, _head(part.shape.head_channels, options))
    else:
        linears |= {role: whole(part.weights[role]) for role in ("query", "key")}
        text = "queries and keys stay whole: something between them and their product needs all"
        events.append(Event("queries_kept", text, value=1))
    return PartReduction(linears, events)


def _mlp(part: Part, options: Options) -> PartReduction:
    covariance = part.stats["down"]["hessian"].double()
    down = part.weights["down"].double()
    width = _width(down.shape[1], options)
    scores = nystrom.leverage(covariance, down, options.ridge)
    kept = nystrom.top_channels(scores, width)
    fitted = nystrom.refit(covariance, down, kept, options.ridge)
    new = fitted.to(part.weights["down"].dtype)
    change = -down
    change[:, kept] += new.double()
    linears = {
        role: Narrowed(weight[kept], kept, None, torch.zeros(len(weight), dtype=torch.float64))
        for role, weight in part.weights.items()
        if role != "down"
    }
    linears["down"] = Narrowed(new, None, kept, _row_errors(change, covariance))
    return PartReduction(linears, _few_tokens(part, "down", down.shape[1]))


def _queries(part: Part, kept: int) -> dict[str, Narrowed]:
    """CR of queries and keys: ``kept`` channels of every head stay.

    A bias stays whole, so that where a channel goes the product of its two biases is left of it.
    """
    shape, covariance = part.shape, part.stats["query"]["hessian"].double()
    size, tokens = shape.head_channels, part.stats["query"]["tokens"].double().clamp_min(1)
    energy, pairs = {}, {}
    for role, heads in (("query", shape.heads), ("key", shape.kv_heads)):
        weight = part.weights[role].double()
        energy[role] = ((weight @ covariance) * weight).sum(-1).clamp_min(0)
        square = energy[role] / tokens
        if role in part.biases:  # the mean of the inputs is not known: no cross term
            square = square + part.biases[role].double().square()
        both = square.view(heads, 2, size // 2).sum(1)
        pairs[role] = both.view(shape.kv_heads, -1, size // 2).sum(1)  # [kv_heads, d/2]
    scores = (pairs["query"] * pairs["key"]).sqrt()
    places = []
    for head in range(shape.kv_heads):
        first = nystrom.top_channels(scores[head], kept // 2)
        places.append(torch.cat([first, first + size // 2]))
    group = shape.heads // shape.kv_heads
    rows = {
        "query": torch.cat([places[h // group] + h * size for h in range(shape.heads)]),
        "key": torch.cat([place + head * size for head, place in enumerate(places)]),
    }
    # A product that is lost is lost once: it is charged to the query, but for what the query's bias
    # has of it, which the key's own part multiplies whatever the query reads.
    errors = {"query": energy["query"].clone(), "key": torch.zeros_like(energy["key"])}
    if "query" in part.biases:
        bias = _by_key_head(part.biases["query"].double().square(), shape)
        reads = _by_key_head(energy["query"] / tokens, shape)
        errors["key"] = energy["key"] * bias / (bias + reads).clamp_min(1e-300)
    for role, kept_rows in rows.items():
        errors[role][kept_rows] = 0
    return {
        role: Narrowed(part.weights[role][rows[role]], rows[role], None, errors[role])
        for role in rows
    }


def _by_key_head(value: Tensor, shape: PartShape) -> Tensor:
    """Sums over the query heads that share a key head, ``[heads · d] -> [kv_heads · d]``."""
    return value.view(shape.kv_heads, -1, shape.head_channels).sum(1).flatten()


def _values(part: Part, kept: int) -> dict[str, Narrowed]:
    """SVD of values and outputs: every value head is left with ``kept`` new channels."""
    shape, size = part.shape, part.shape.value_channels
    covariance = part.stats["value"]["hessian"].double()
    group = shape.heads // shape.kv_heads
    value = part.weights["value"].double().view(shape.kv_heads, size, -1)
    output = part.weights["output"].double()
    hidden = len(output)
    heads = output.view(hidden, shape.kv_heads, group, size)
    bias = part.biases.get("value")
    new_bias = None if bias is None else torch.zeros_like(bias)
    new_value, new_output, mixes = [], output.new_empty(hidden, shape.heads, kept), []
    for head in range(shape.kv_heads):
        stacked = heads[:, head].transpose(0, 1).reshape(-1, size)  # [group · hidden, size]
        q, r = torch.linalg.qr(stacked)
        mapped = r @ value[head]
        _, vectors = torch.linalg.eigh(mapped @ covariance @ mapped.T)
        leading = vectors.flip(-1)[:, :kept]
        mixes.append(leading.T @ r)  # new channels from the old ones, [kept, size]
        new_value.append(leading.T @ mapped)
        own = (q @ leading).view(group, hidden, kept).transpose(0, 1)
        new_output[:, head * group : (head + 1) * group] = own
        if bias is not None and new_bias is not None:
            moved = mixes[-1] @ bias.double()[head * size : (head + 1) * size]
            new_bias[head * size : head * size + kept] = moved.to(bias.dtype)
    inputs = torch.block_diag(*(mix for mix in mixes for _ in range(group)))
    rounded = new_output.flatten(1).to(part.weights["output"].dtype)
    change = rounded.double() @ inputs - output
    places = torch.arange(kept, device=output.device)
    starts = torch.arange(0, shape.heads * size, size, device=output.device)
    rows = (starts[: shape.kv_heads, None] + places).flatten()
    columns = (starts[:, None] + places).flatten()
    dtype = part.weights["value"].dtype
    return {
        "value": Narrowed(
            torch.cat(new_value).to(dtype),
            rows,
            None,
            torch.zeros(len(part.weights["value"]), dtype=torch.float64),
            bias=new_bias,
            slopes=torch.block_diag(*(torch.linalg.pinv(mix).T for mix in mixes)),
        ),
        "output": Narrowed(
            rounded,
            None,
            columns,
            _row_errors(change, part.stats["output"]["hessian"].double()),
            inputs=inputs,
        ),
    }


def _row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """diag(ΔW H ΔWᵀ), float64 ``[out]``."""
    return ((change @ hessian) * change).sum(-1).clamp_min(0)


def _few_tokens(part: Part, role: str, width: int) -> list[Event]:
    tokens = int(part.stats[role]["tokens"])
    if tokens >= width:
        return []
    text = f"{tokens} tokens for the {width} channels that {role} reads"
    return [Event("few_tokens", text, value=tokens)]
