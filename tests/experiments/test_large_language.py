"""The large training, dry: toy size, on the CPU; both attentions, broken off, continued, on two processes."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import lib.experiments.large_language as large
import lib.training
from lib.distributed import ranks
from lib.experiments.large_estimates import estimate_large
from lib.experiments.large_language import Cosine, LargeSettings, main, train_large
from lib.experiments.recipe import read_settings
from lib.models.pretrained import load_tokenizer
from lib.models.transformer import Transformer
from lib.paths import ROOT
from lib.tasks import text

TOY = {
    "tokenizer": "austen", "L": 2, "d_model": 32, "n_heads": 4, "d_mlp": 88, "T": 32, "batch": 8,
    "micro_batch": 4, "steps": 10, "windows": [8, None], "evaluation_windows": 8, "evaluate_every": 4,
    "checkpoint_every": 2, "adamw_lr": 1e-2, "device": "cpu", "trial_steps": 0,
}  # fmt: skip
PAPER = {
    "corpus": "austen", "tokenizer": "austen", "L": 24, "d_model": 1024, "n_heads": 16, "d_mlp": 2816,
    "T": 2048, "batch": 256, "steps": 13_500, "micro_batch": 4, "precision": "bfloat16", "compile": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, nothing of a launch in the environment, and no process group left to the next test."""
    for name in ranks.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text of 20 kB; the token files of all tests come beside it."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "corpus.txt").write_text(text.prose()[:20_000], encoding="utf-8")
    return folder


def train(place, *, seed=0, scratch=None, **changes):
    given = TOY | {"corpus": str(place / "corpus.txt"), "cache": str(place / "cache")} | changes
    return train_large(given, seed=seed, scratch=scratch)


def measured(row):
    """What must be the same in every run: all but how long the trial took."""
    return {name: value for name, value in row.items() if name != "estimates"}


@pytest.fixture(scope="module")
def unbroken(place):
    """One run of each attention."""
    found = {attention: train(place, attention=attention) for attention in ("mha", "dcmha")}
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "dcmha"])
def test_a_dry_run_learns_and_says_what_it_read(unbroken, attention):
    row = unbroken[attention]
    assert row["untrained_loss_nats"] > row["loss_nats"] + 0.2
    assert [step for step, _ in row["loss_curve"]] == [4, 8, 10]
    assert row["tokens_trained"] == 10 * 8 * 32
    assert row["epochs"] == pytest.approx(80 / row["corpus_windows"])
    assert json.loads(json.dumps(row)) == row
    assert not set(row) & {*LargeSettings.__dataclass_fields__, "seed", "wall_s", "core_s"}


@pytest.mark.slow
def test_composed_heads_add_weights_to_attention_alone(unbroken):
    mha, dcmha = unbroken["mha"], unbroken["dcmha"]
    H, R, D, L = 4, 2, 32, 2
    extra = L * ((8 * R + 4) * H * D + 16 * R * R * H * H)
    assert dcmha["attention_parameters"] - mha["attention_parameters"] == extra
    assert dcmha["parameters"] - mha["parameters"] == extra
    assert mha["corpus_sha256"] == dcmha["corpus_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "dcmha"])
def test_a_killed_run_goes_on_to_the_same_weights(place, unbroken, tmp_path, monkeypatch, attention):
    """On another micro-batch: how it is computed may change, up to the rounding of sums."""
    with monkeypatch.context() as broken:
        batch, steps = large.window_batch, []

        def until(ids, step, **more):
            steps.append(step)
            if step == 7:
                raise KeyboardInterrupt
            return batch(ids, step, **more)

        broken.setattr(large, "window_batch", until)
        with pytest.raises(KeyboardInterrupt):
            train(place, attention=attention, scratch=tmp_path)
    steps = []
    monkeypatch.setattr(
        large, "window_batch", lambda ids, step, **m: steps.append(step) or batch(ids, step, **m)
    )
    again = train(place, attention=attention, scratch=tmp_path)
    assert steps == [6, 7, 8, 9]
    assert measured(again) == measured(unbroken[attention])


@pytest.mark.slow
def test_the_micro_batch_changes_nothing_but_the_rounding_and_the_seed_does(place, unbroken):
    one = train(place, micro_batch=8)
    assert one["loss_curve"][-1][1] == pytest.approx(unbroken["mha"]["loss_nats"], abs=1e-4)
    assert one["step0_hash"] == unbroken["mha"]["step0_hash"]
    other = train(place, seed=1)
    assert other["step0_hash"] != one["step0_hash"]
    assert other["loss_nats"] != one["loss_nats"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's
def test_compiled_sublayers_compute_the_same(place, monkeypatch):
    """Traced as torch.compile traces it, without a compiler of C++ behind it; also computed again."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    small = {"attention": "dcmha", "L": 1, "windows": [8], "steps": 2}
    rows = [train(place, **small, **how) for how in ({}, {"compile": True, "recompute": True})]
    assert rows[1]["loss_curve"][0] == pytest.approx(rows[0]["loss_curve"][0], abs=1e-4)
    assert rows[1]["training_loss_nats"] == pytest.approx(rows[0]["training_loss_nats"], abs=1e-4)


@pytest.mark.slow
def test_attention_that_is_computed_again_gives_the_same_weights(place, unbroken):
    row = train(place, attention="dcmha", recompute=True)
    assert measured(row) == measured(unbroken["dcmha"])


@pytest.mark.slow
def test_in_bfloat16_it_learns_nearly_the_same(place, unbroken, monkeypatch):
    monkeypatch.setattr(lib.training, "cpu_has_bfloat16", lambda: True)  # slow where emulated, but right
    row = train(place, attention="dcmha", precision="bfloat16")
    assert row["loss_nats"] == pytest.approx(unbroken["dcmha"]["loss_nats"], abs=0.03)
    assert row["loss_nats"] != unbroken["dcmha"]["loss_nats"]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place, unbroken, tmp_path):
    """From the command line, under torchrun: gloo, weights and moments sharded, half a batch on each."""
    given = TOY | {"corpus": str(place / "corpus.txt"), "cache": str(place / "cache"), "micro_batch": 2}
    given |= {"attention": "dcmha", "trial_steps": 1}
    (tmp_path / "settings.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lib.experiments.large_language", str(tmp_path / "settings.json")]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "row.json").read_text())
    alone = unbroken["dcmha"]
    assert [loss for _, loss in row["loss_curve"]] == pytest.approx(
        [loss for _, loss in alone["loss_curve"]], abs=1e-4
    )
    assert row["corpus_sha256"] == alone["corpus_sha256"]
    assert row["estimates"]["devices"] == 2
    assert done.stdout.count("Estimated, not measured") == 1  # one process speaks
    assert row["estimates"]["trial_tokens_per_s"] > 0


@pytest.mark.slow
def test_the_trial_says_how_long_it_would_take_and_changes_nothing(place, unbroken, capsys):
    row = train(place, trial_steps=2)
    said = capsys.readouterr().out
    assert measured(row) == measured(unbroken["mha"])
    found = row["estimates"]
    read = (10 * 8 + 3 * 8 / 3) * 32  # three evaluations, a third of the work each
    assert found["trial_hours"] == pytest.approx(read / found["trial_tokens_per_s"] / 3600, abs=1e-4)
    assert "Estimated, not measured:" in said and "Timed:" in said


def test_the_paper_sized_model_has_405_million_weights_and_fits_80_gb():
    tokens, vocab = 256 * 2048, 50_257
    found = {}
    for attention in ("mha", "dcmha"):
        chosen = read_settings(LargeSettings, PAPER | {"attention": attention, "device_memory_gb": 80.0})
        assert chosen.tokens_kept() == 13_500 * tokens + 128 * 2048 + 1
        found[attention] = estimate_large(chosen, chosen.config(vocab=vocab), ranks=1, device="cuda")
        large.check_fits(found[attention], chosen)
    assert (
        found["mha"]["model_parameters"]
        == 2 * 50_304 * 1024 + 24 * (4 * 1024**2 + 2 * 64 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    )
    assert found["dcmha"]["memory_gb"]["pairs"] == pytest.approx(
        4 * 4 * (8 * 16 + 4 * 2 + 4 * 16) * 2048**2 / 1e9, rel=1e-3
    )
    assert found["mha"]["memory_gb"]["pairs"] == 0
    assert found["mha"]["gradient_parts"] == 64
    kept = read_settings(LargeSettings, PAPER | {"attention": "dcmha", "recompute": False})
    hopeless = estimate_large(kept, kept.config(vocab=vocab), ranks=1, device="cuda")
    assert hopeless["total_gb"] > 200  # all pairs of all layers: why attention is computed again


def test_what_cannot_fit_is_refused_before_the_corpus_is_read(place, monkeypatch):
    monkeypatch.setattr(large, "token_file", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(
        ValueError, match=r"needs about .* GB on each device .* has 0\.0.*micro_batch below 4"
    ):
        train(place, device_memory_gb=0.001)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="too short"):  # not refused for its memory, but for what comes next
        train(place, device_memory_gb=0.001, check_memory=False, batch=4000)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"corpus": "no/such.txt"}, FileNotFoundError, "does not exist; give the path of a UTF-8 text file"),
        ({"corpus": ""}, ValueError, "no corpus is named"),
        ({"corpus": "org/name"}, ImportError, "pip install datasets"),
        ({"tokenizer": "ausen"}, ValueError, "unknown model 'ausen'; did you mean 'austen'"),
        ({"tokenizer": "org/name"}, FileNotFoundError, "org/name"),
        ({"batch": 4_000}, ValueError, "is too short: .* tokens are .* windows of T=32"),
        ({"evaluation_windows": 10**6}, ValueError, "is too short"),
        ({"batch": 10}, ValueError, "batch must be a multiple of micro_batch: batch=10, micro_batch=4"),
        ({"attention": "dcmah"}, ValueError, "did you mean 'dcmha'"),
        ({"schedule": "constant"}, ValueError, "Allowed: cosine, linear"),
        ({"n_heads": 5}, ValueError, "n_heads must divide d_model"),
        ({"steps": 0}, ValueError, "steps is a whole number of at least 1, got 0"),
        ({"warmup_share": 2}, ValueError, "warmup_share is between 0 and 1"),
        ({"windows": []}, ValueError, "windows must name at least one"),
        ({"precision": "float16"}, ValueError, "Allowed: float32, bfloat16"),
        ({"widows": [3]}, ValueError, "did you mean 'windows'"),
    ],
)
def test_what_is_wrong_is_told_before_any_training(place, monkeypatch, changes, error, said):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(large, "fit_distributed", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(error, match=said):
        train(place, **changes)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    chosen = read_settings(LargeSettings, PAPER)
    assert chosen.micro_batches(8) == 8
    with pytest.raises(ValueError, match="256 windows does not divide into 3 process"):
        chosen.micro_batches(3)


def test_a_kept_checkpoint_has_a_place_of_its_own_for_each_run(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "BUILD", tmp_path)
    kept = [read_settings(LargeSettings, PAPER | {"keep": True, "attention": a}) for a in ("mha", "dcmha")]
    folders = {large._folder(chosen, seed, None) for chosen in kept for seed in (0, 1)}
    assert len(folders) == 4 and {folder.parent for folder in folders} == {tmp_path / "large"}
    moved = read_settings(LargeSettings, PAPER | {"keep": True, "micro_batch": 2, "compile": False})
    assert large._folder(moved, 0, None) in folders  # the machine is no part of what the run is


def test_the_schedules_rise_for_one_percent_and_fall_to_a_tenth():
    for schedule in ("cosine", "linear"):
        plan = read_settings(LargeSettings, PAPER | {"schedule": schedule}).plan()
        rate = [plan.factor(step, 13_500) for step in range(13_500)]
        assert rate[0] == pytest.approx(1 / 135)
        assert max(rate) > 0.98 and 130 <= rate.index(max(rate)) <= 136
        assert rate[-1] == pytest.approx(0.1)
        assert rate[135 + (13_500 - 135) // 2] == pytest.approx(0.55, abs=0.01)
    cosine = Cosine(warmup=0, floor=0.0)
    assert cosine.factor(249, 1000) == pytest.approx(0.8536, abs=1e-3)  # linear would be at 0.75


def test_the_command_line_estimates_without_a_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Transformer, "__init__", lambda *_, **__: pytest.fail("nothing is built"))
    (tmp_path / "settings.json").write_text(json.dumps(PAPER | {"corpus": "not/here.txt"}))
    main([str(tmp_path / "settings.json"), "--estimate", "--ranks", "8"])
    said = capsys.readouterr().out
    assert "on each of 8 device(s)" in said and "7,077,888,000 tokens" in said


def test_the_vocabulary_is_rounded_up_and_every_token_has_a_row():
    chosen = read_settings(LargeSettings, PAPER)
    assert chosen.config(vocab=50_257).vocab == 50_304
    assert chosen.config(vocab=load_tokenizer("austen").get_vocab_size()).vocab == 1024
