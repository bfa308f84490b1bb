"""The book's own language model is the one that its recorded run has trained, and it has learnt."""

import json

import torch
from torch.nn.functional import cross_entropy

from lib.models import pretrained
from lib.paths import DATA, EVIDENCE
from lib.tasks import text

FILE = DATA / "models" / "austen.safetensors"


def recorded():
    (path,) = EVIDENCE.glob("*/embedded.standard.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["result"] for row in rows if "result" in row][-1]


def test_its_weights_are_those_of_the_recorded_run_and_fit_into_eight_megabytes():
    assert pretrained.load("austen").weights_hash() == recorded()["weights_hash"]
    assert FILE.stat().st_size <= 8_000_000


def test_it_reads_its_own_tokens_far_better_than_the_commonest_guess():
    model, windows = pretrained.load("austen").eval(), text.chunks(text.austen_tokens("validation"), 128)[:40]
    with torch.no_grad():
        logits = model(windows[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert abs(loss - recorded()["loss_nats"]) < 0.3 and loss < recorded()["loss_unigram"] / 2
