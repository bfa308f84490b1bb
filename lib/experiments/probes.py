"""What a linear readout finds in each layer of a frozen language model: closed-form ridge probes.

A probe is least squares from the residual stream to one-hot labels, W = (S_xx + n ridge diag)^-1 S_xy about
the means, and answers with the largest coordinate. It is fitted on text of the training split and judged on
the validation split. Three labels, from easy to carry to hard: the token two places back (is it still
there?), the novel the text is from (a property of the whole), and the next token (what the model is for).

Source: linear probes as in Alain and Bengio 2016; here in closed form, so nothing depends on an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib.models.transformer import Transformer
from lib.tasks.text import austen_chunks

LABELS = ("two_back", "novel", "next")
BATCH = 16  # chunks in one forward pass
RIDGE = 1e-4  # of the mean variance of the stream: enough where coordinates are dependent


def probe_layers(model: Transformer, fit: Mapping, judge: Mapping, *, classes: Mapping) -> dict:
    """Accuracy of a probe before each layer and after the last, by label: {label: [L + 1 shares]}.

    fit, judge: as `probe_text` makes them. classes: label -> number of classes. Text is streamed once; what
    is kept are Grams of D x D and D x classes for each layer, in float64. Raises ValueError where there are
    fewer tokens to fit than D + 2.
    """
    D, device = model.config.d_model, next(model.parameters()).device
    tokens = fit["tokens"][:, 2:-1].numel()
    if tokens < D + 2:
        raise ValueError(f"{tokens} tokens are too few to fit probes on a stream of width {D}")
    stack = _streams(model, fit["tokens"][:BATCH].to(device))
    n_layers, centre = len(stack), stack.mean(dim=1)  # (L + 1, D): about it no digits are lost
    xx = torch.zeros(n_layers, D, D, dtype=torch.float64, device=device)
    sums = torch.zeros(n_layers, D, dtype=torch.float64, device=device)
    zeros = {name: torch.zeros(n_layers, D + 1, classes[name]).to(xx) for name in LABELS}
    kinds = {name: of[:, :D] for name, of in zeros.items()}  # (L + 1, D, classes): sums of x by label
    counts = {name: of[0, D] for name, of in zeros.items()}
    for part, labels in _batches(fit, device):
        x = _streams(model, part) - centre[:, None]  # (L + 1, N, D)
        xx += (x.mT @ x).double()
        sums += x.sum(dim=1).double()
        for name in LABELS:
            kinds[name].index_add_(2, labels[name], x.mT.double())
            counts[name] += torch.bincount(labels[name], minlength=classes[name])
    mean = sums / tokens
    xx -= tokens * mean[:, :, None] * mean[:, None, :]
    variance = xx.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    factor = torch.linalg.cholesky(xx + RIDGE * variance * torch.eye(D, dtype=xx.dtype, device=device))
    W, b = {}, {}
    for name in LABELS:
        share = counts[name] / tokens
        W[name] = torch.cholesky_solve(kinds[name] - sums[:, :, None] * share, factor)
        b[name] = (share - (mean[:, None] @ W[name])[:, 0])[:, None].float()
        W[name] = W[name].float()
    right, judged = {name: torch.zeros(n_layers, dtype=torch.long, device=device) for name in LABELS}, 0
    for part, labels in _batches(judge, device):
        x = _streams(model, part) - centre[:, None]
        judged += x.shape[1]
        for name in LABELS:
            right[name] += ((x @ W[name] + b[name]).argmax(dim=2) == labels[name]).sum(dim=1)
    return {name: (right[name].double() / judged).tolist() for name in LABELS}


def probe_text(split: str, T: int, chunks: int) -> dict[str, Tensor]:
    """{"tokens": (chunks, T), "novel": (chunks,)}: windows of the novels, evenly spread over a split."""
    if T < 4:
        raise ValueError(f"a probe asks for the tokens two back and one ahead: T >= 4, got T={T}")
    tokens, novel = austen_chunks(split, T)
    chosen = spread(len(tokens), chunks)
    return {"tokens": tokens[chosen], "novel": novel[chosen]}


def commonest(judge: Mapping, fit: Mapping) -> dict[str, float]:
    """Accuracy of always answering the label that is commonest in `fit`: what a probe must beat."""
    found = {}
    for name in LABELS:
        guess = _labels(fit["tokens"], fit["novel"])[name].mode().values
        found[name] = (_labels(judge["tokens"], judge["novel"])[name] == guess).double().mean().item()
    return found


def spread(available: int, wanted: int) -> Tensor:
    """`wanted` of `available` indices at even distances, ascending. ValueError if there are not so many."""
    if not 1 <= wanted <= available:
        raise ValueError(f"{wanted} windows are asked for, the text holds {available}")
    return torch.arange(wanted) * available // wanted


def _batches(text: Mapping, device):
    for i in range(0, len(text["tokens"]), BATCH):
        tokens, novel = text["tokens"][i : i + BATCH].to(device), text["novel"][i : i + BATCH].to(device)
        yield tokens, _labels(tokens, novel)


def _labels(tokens: Tensor, novel: Tensor) -> dict[str, Tensor]:
    """Labels of the tokens 2 … T - 2 of each window, flat."""
    inner = tokens[:, 2:-1]
    return {
        "two_back": tokens[:, :-3].flatten(),
        "novel": novel[:, None].expand_as(inner).flatten(),
        "next": tokens[:, 3:].flatten(),
    }


@torch.no_grad()
def _streams(model: Transformer, tokens: Tensor) -> Tensor:
    """The stream before each layer and after the last, at tokens 2 … T - 2: (L + 1, N, D)."""
    h = model.embed(tokens)
    found = [h]
    for l in range(model.config.n_layers):
        attention, mlp = model.run_layer(l, h)
        h = h + attention + mlp
        found.append(h)
    return torch.stack(found)[:, :, 2:-1].flatten(1, 2)
