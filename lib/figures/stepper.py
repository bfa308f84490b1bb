"""The decoder of sequential composition for a page: its very weights, and the HTML that runs them.

The page computes the forward pass itself (`book/theme/stepper.js`); only the worked run is computed here. It
stands in the page where no script runs. In a notebook:

    data = stepper_data(SequentialComposition(m=2, ns=(2,)))
    HTML(stepper_html("decoder-stepper", data))
"""

from __future__ import annotations

import html
import json
import re

import torch
from torch import Tensor, nn

from lib.models.constructions import layout, least_sharpness, sequential_composition_decoder
from lib.tasks.composition import Instances, SequentialComposition

SCRIPT = "../_static/stepper.js"  # where the site has it, seen from a chapter


def stepper_data(task: SequentialComposition, *, sharpness: float | None = None) -> dict:
    """Everything that the page needs to run `sequential_composition_decoder(task)`: JSON-able, lossless.

    task: m, ns, N, T.  parts: the residual stream, each part with its first column and its size.
    symbols: names of the rows of the embedding.  embedding, W_U and the layers' W_Q, W_K, W_V, W_O, W_1, W_2:
    {rows, columns, entries: [row, column, weight]} without zeros; b_1, b_2 in full.  sharpness: c, least
    (the proved c*) and multiple = c / c*.  input: what is shown first.  worked: its run, for `stepper_html`.
    """
    model = sequential_composition_decoder(task, sharpness=sharpness, dtype=torch.float64)
    least = least_sharpness(task.prompt_length)
    c = 2 * least if sharpness is None else sharpness
    first = _first_input(task)
    return {
        "task": {"m": task.m, "ns": list(task.ns), "N": list(task.N), "T": task.prompt_length},
        "parts": [{"name": name, "first": columns.start, "size": len(columns)}
                  for name, columns in layout(task).items()],
        "symbols": task.symbols,
        "d_head": model.config.head_width,
        "sharpness": {"c": c, "least": least, "multiple": c / least},
        "embedding": _sparse(model.embedding.weight),
        "layers": [
            {name: _sparse(getattr(layer.attention, name).weight) for name in ("W_Q", "W_K", "W_V", "W_O")}
            | {name: _sparse(linear.weight) for name, linear in _linears(layer.mlp).items()}
            | {f"b{name[1:]}": linear.bias.tolist() for name, linear in _linears(layer.mlp).items()}
            for layer in model.layers],
        "W_U": _sparse(model.W_U.weight),
        "input": {"z0": int(first.z0[0]), "tables": [table[0].tolist() for table in first.tables],
                  "w": first.w[0].tolist()},
        "worked": _worked(model, task, first),
    }


def stepper_html(element_id: str, data: dict) -> str:
    """The element with the worked run as a table, and the scripts that put the stepper in its place.

    ValueError on an id that would need escaping in HTML or CSS.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", element_id):
        raise ValueError(f"an id begins with a letter, then letters, digits and hyphens; got {element_id!r}")
    taken = {name: value for name, value in data.items() if name != "worked"}
    # "<" may end the script element from within a string
    script = json.dumps(taken, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    names = ["layer", "the token w asks for", "it finds", "with weight", "current afterwards"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        + "</tr>" for row in data["worked"]["rows"])
    return (
        f'<div class="widget" id="{element_id}">'
        f"<p>{html.escape(data['worked']['input'])} Layer by layer, at the token w:</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p>{html.escape(data['worked']['answer'])}</p>"
        f"<noscript><p>With JavaScript, this table becomes a decoder to step through.</p></noscript></div>\n"
        f'<script src="{SCRIPT}"></script>\n'
        # in JupyterLab the site's script is not there: the table stays
        f"<script>window.ProofAndProbe && ProofAndProbe.mountStepper && "
        f'ProofAndProbe.mountStepper("{element_id}", {script});</script>')


def _linears(mlp: nn.Module) -> dict[str, nn.Linear]:
    return {"W_1": mlp.W_1, "W_2": mlp.W_2}


def _sparse(weight: Tensor) -> dict:
    """A matrix without its zeros. Every number is a double that JSON keeps; whole ones are written short."""
    entries = [[*place, _short(float(weight[tuple(place)].detach()))] for place in weight.nonzero().tolist()]
    return {"rows": weight.shape[0], "columns": weight.shape[1], "entries": entries}


def _short(x: float) -> float | int:
    return int(x) if x.is_integer() else x


def _first_input(task: SequentialComposition) -> Instances:
    """z_l(j) = j - 1 mod N, z_0 = 0, w_l as large as it may be: for m=2, ns=(2,) the steps are 0, 1, 2."""
    tables = tuple((torch.arange(N)[None] - 1) % N for N in task.N)
    w = torch.tensor([[n - 1 for n in task.ns]], dtype=torch.long)
    return Instances(torch.tensor([0]), tables, w)


@torch.inference_mode()
def _worked(model: nn.Module, task: SequentialComposition, one: Instances) -> dict:
    """The run on one input in words: the input, a row for each layer, the answer."""
    trace = model.trace(task.tokens(one), read=("residual", "attention_weight"))
    steps, place, rows = task.steps(one)[0].tolist(), task.places(), []
    columns = layout(task)["current"]
    for t in range(task.L + 1):
        weight = trace.attention_weight[t, 0, 0, -1]
        found = int(weight.argmax())
        part = max((name for name in place if place[name] <= found), key=place.get)
        entry = found - place[part]
        bits = (trace.residual[t + 1, 0, -1, columns.start : columns.stop] > 0).tolist()
        value = int("".join(str(int(bit)) for bit in bits), 2)
        rows.append([f"{t + 1} of {task.L + 1}", _asked(task, one, t, steps), _entry_name(task, part, entry),
                     f"{float(weight[found]):.4f}", f"i_{t} = {value}"])
    tables = "; ".join(f"z_{l} = {tuple(table[0].tolist())}" for l, table in enumerate(one.tables, 1))
    w = "".join(f", w_{l} = {int(x)}" for l, x in enumerate(one.w[0], 1))
    answer = int(trace.logits[0, -1].argmax())
    return {"input": f"Input: {tables}; z_0 = {int(one.z0)}{w}.", "rows": rows,
            "answer": f"The decoder answers {answer}; the definition says i_{task.L} = {steps[-1]}."}


def _asked(task: SequentialComposition, one: Instances, t: int, steps: list[int]) -> str:
    if t == 0:
        return "z_0"
    w = f"w_{t - 1} = {int(one.w[0, t - 2])}, " if t >= 2 else ""
    return f"z_{t} at {w}i_{t - 1} = {steps[t - 1]}"


def _entry_name(task: SequentialComposition, part: str, entry: int) -> str:
    """z_2(1, 0) for entry 2 of z_2 where N_0 = 2."""
    if part in ("z_0", "w"):
        return part
    l = int(part[2:])
    if l == 1:
        return f"z_1({entry})"
    return f"{part}({entry // task.N[l - 2]}, {entry % task.N[l - 2]})"
