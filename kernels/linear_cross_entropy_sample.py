"""The generator's vocabulary projection, its cross-entropy, and one exact sample a row."""

import torch
import torch.nn.functional as F

TILE = 128  # tokens of the finer level of the cumulative distribution
CHUNK = 256  # rows whose logits are held at once


def linear_cross_entropy_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T + bias), and a draw from its tempered form.

    hidden [M, D], weight [V, D], bias [V], labels [M] int32 (-1: no loss for the row), uniforms [M]
    fp32 in [0, 1).
    → loss [] fp32: Σ -log softmax(logits)[label]; sampled [M] int32: the first token at which the
    cumulative distribution of softmax(logits / temperature) exceeds the row's uniform, no gradient;
    correct [] fp32: rows whose label has the largest logit.
    """
    inputs = (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    loss, sampled, correct, *_ = chunked(*inputs, labels, uniforms, temperature, wanted)
    return loss, sampled, correct


@torch.library.custom_op("fastelectra::chunked_cross_entropy_sample", mutates_args=())
def chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of CHUNK rows at a time; with them their loss, samples and share of the gradients.

    → loss, sampled, correct, and the gradients of hidden, weight and bias (empty if not wanted).
    """
    outputs = _outputs(hidden, weight, bias, gradients)
    loss, sampled, correct, d_hidden, d_weight, d_bias = outputs
    for start in range(0, hidden.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        logits = torch.addmm(bias, hidden[rows], weight.t()).to(loss.dtype)
        row_loss, sampled[rows], row_correct = rows_torch(
            logits, labels[rows], uniforms[rows], temperature, gradients
        )
        loss += row_loss.sum()
        correct += row_correct.sum()
        if gradients:
            d_logits = logits.to(hidden.dtype)
            torch.mm(d_logits, weight, out=d_hidden[rows])
            d_weight.addmm_(logits.t(), hidden[rows].to(loss.dtype))
            d_bias += logits.sum(0)
    return outputs


@chunked.register_fake
def _(hidden, weight, bias, labels, uniforms, temperature, gradients):
    return _outputs(hidden, weight, bias, gradients)


def _outputs(hidden, weight, bias, gradients):
    """Zeroed loss, correct and gradient sums; room for sampled and the gradient of hidden."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, bias.shape) if gradients else ((0,), (0,), (0,))
    return (
        hidden.new_zeros((), dtype=statistics),
        hidden.new_empty(hidden.shape[0], dtype=torch.int32),
        hidden.new_zeros((), dtype=torch.float32),
        hidden.new_empty(shapes[0]),
        hidden.new_zeros(shapes[1], dtype=statistics),
        hidden.new_zeros(shapes[2], dtype=statistics),
    )


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]


def _scale_gradients(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 7
    scaled = (
        (gradient * d_loss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return (*scaled, None, None, None, None)


chunked.register_autograd(_scale_gradients, setup_context=_save_gradients)


def rows_torch(logits, labels, uniforms, temperature, gradients):
    """Loss [m], sampled [m] and correct [m] of logits [m, V], which become their gradient."""
    real = labels >= 0
    target_index = labels.clamp(min=0).long()[:, None]
    target = logits.gather(1, target_index)[:, 0]
    top = logits.amax(1)
    correct = (target >= top) & real
    shifted = logits.sub_(top[:, None])
    tempered = torch.exp(shifted / temperature) if temperature != 1 else None
    mass = shifted.exp_()
    total = mass.sum(1)
    sampled = sample(mass if tempered is None else tempered, uniforms)
    loss = (total.log() - (target - top)).masked_fill(~real, 0)
    if gradients:
        mass *= (real / total)[:, None]
        mass.scatter_add_(1, target_index, -real.to(mass.dtype)[:, None])
    return loss, sampled, correct


def sample(mass, uniforms):
    """First index at which the cumulative sum of mass [m, V] exceeds uniforms · its total."""
    vocabulary = mass.shape[1]
    whole = vocabulary // TILE * TILE
    tiles = mass[:, :whole].unflatten(1, (whole // TILE, TILE)).sum(2)
    if whole < vocabulary:
        tiles = torch.cat([tiles, mass[:, whole:].sum(1, keepdim=True)], 1)
    goal = uniforms * tiles.sum(1)
    tile, before = _first_above(tiles, goal)
    index = tile[:, None] * TILE + torch.arange(TILE, device=mass.device)
    inside = mass.gather(1, index.clamp(max=vocabulary - 1)).masked_fill(index >= vocabulary, 0)
    return (tile * TILE + _first_above(inside, goal - before)[0]).to(torch.int32)


def _first_above(mass, goal):
    """(first index whose cumulative mass exceeds goal [m], the mass before it).

    Only an index with mass of its own; the last such if rounding put the goal beyond the total.
    """
    cumulative = mass.cumsum(1)
    index = torch.arange(mass.shape[1], device=mass.device)
    last = index.where(mass > 0, 0).amax(1, keepdim=True)
    first = index.where((cumulative > goal[:, None]) & (mass > 0), last).amin(1, keepdim=True)
    before = cumulative.gather(1, first) - mass.gather(1, first)
    return first[:, 0], before[:, 0]


def linear_cross_entropy_sample_reference(hidden, weight, bias, labels, uniforms, temperature=1.0):
    """`linear_cross_entropy_sample` in plain PyTorch, all logits at once."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight, bias).to(statistics)
    loss = F.cross_entropy(logits, labels.long(), ignore_index=-1, reduction="sum")
    with torch.no_grad():
        cumulative = (logits / temperature).softmax(1).cumsum(1)
        goal = (uniforms * cumulative[:, -1])[:, None]
        sampled = torch.searchsorted(cumulative, goal, right=True, out_int32=True)[:, 0]
        target = logits.gather(1, labels.clamp(min=0).long()[:, None])[:, 0]
        correct = (target >= logits.amax(1)) & (labels >= 0)
    return loss, sampled, correct.sum(dtype=torch.float32)
