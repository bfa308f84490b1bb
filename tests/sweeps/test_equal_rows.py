"""The same sweep gives the same rows, byte for byte, in this process, in others, on Dask and on Ray."""

import pytest

from lib.evidence.rows import RowStore, content
from lib.sweeps import run_sweep

KINDS = ["value", "training", "raises", "raises from", "exits", "nan", "generator", "not a dict"]
GRID = [{"kind": kind, "a": a} for kind in KINDS for a in (1, 2)]


def make_run():
    """The run function, made here so that it travels to other processes by value."""

    def inner(a):
        return {}[f"no {a}"]

    def run(settings, *, seed):
        import torch
        from torch.nn.functional import cross_entropy

        from lib.models.transformer import Transformer, TransformerConfig
        from lib.optimizers import Optimizer
        from lib.tasks.sum2 import Sum2
        from lib.training import fit

        kind, a = settings["kind"], settings["a"]
        if kind == "training":
            task = Sum2(n=3, M=7)
            shape = TransformerConfig(vocab=task.vocab, n_logits=2, d_model=8, n_heads=2, positions="none")
            history = fit(
                Transformer(shape, seed=seed),
                lambda model, sums: cross_entropy(model(sums.tokens)[:, -1], sums.label),
                lambda step: task.batch(step, seed=seed, size=4),
                steps=5 * a, optimizer=Optimizer(), progress=False,
            )  # fmt: skip
            return {"loss": history.loss, "threads": torch.get_num_threads()}
        if kind == "raises":
            inner(a)
        if kind == "raises from":
            try:
                inner(a)
            except KeyError as error:
                raise RuntimeError(f"run {a} lost its key") from error
        if kind == "exits":
            raise SystemExit(a)
        x = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))
        value = float((a * x @ x).sin().sum())
        odd = {"nan": {"v": float("nan")}, "generator": {"v": (x for x in "ab")}, "not a dict": [value]}
        return odd.get(kind, {"v": value})

    return run


def rows_of(path, **how):
    store = RowStore(path, code="c0ffee")
    run_sweep(make_run(), GRID, seeds=[0, 1], store=store, progress=False, **how)
    return {store.key(row["settings"], row["seed"]): content(row) for row in store.rows()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return rows_of(tmp_path_factory.mktemp("one") / "rows.jsonl", n_jobs=1)


def test_each_kind_of_failure_has_its_reason(one):
    found = dict.fromkeys(KINDS, "")
    for row in one.values():
        found |= {kind: row for kind in KINDS if f'"kind":"{kind}"' in row}
    assert [kind for kind in KINDS if '"failed"' not in found[kind]] == ["value", "training"]
    said = {
        "raises": "KeyError: 'no 2'", "raises from": "direct cause", "exits": "SystemExit: 2",
        "nan": "is nan", "generator": "is a generator", "not a dict": "returned a list",
    }  # fmt: skip
    assert {kind: text for kind, text in said.items() if text not in found[kind]} == {}
    assert "in inner" in found["raises"] and "lib/sweeps" not in found["raises"]
    assert '"threads":1' in found["training"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "dask", "ray"], indirect=True)
def test_rows_do_not_depend_on_where_runs_are_computed(tmp_path, one, engine):
    found = rows_of(tmp_path / "rows.jsonl", n_jobs=2, backend=engine)
    assert len(one) == len(GRID) * 2 and found == one
