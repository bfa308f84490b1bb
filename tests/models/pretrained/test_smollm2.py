"""SmolLM2-135M itself, against transformers on the same GGUF file. Skipped where it was not fetched."""

import time

import pytest
import torch

from lib.models import pretrained

HERE = pretrained.available("smollm2-135m")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE, reason="SmolLM2 is not here: `make models` fetches it"),
]
TEXT = (
    "The bridge over the river was built in the spring of the year after the flood. It is of stone and "
    "has five arches, each ten metres wide. Before it was opened, people had to cross the water by boat, "
    "which was slow and often dangerous in winter. Today the bridge is used by thousands of cars every day, "
    "and the city plans to build a second one to reduce the traffic in the centre."
)
VARIED = [
    TEXT,
    "It's 1698; don't wait!  def f(x):\n\treturn x**2  # twice\n\n\n",
    "naïve café, Ångström, 你好, 🙂, Привет — “quotes” …",
    "<|im_start|>user\nHow many?<|im_end|>\n",
    "   leading and trailing   ",
]


@pytest.fixture(scope="module")
def model():
    return pretrained.load("smollm2-135m")


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([pretrained.load_tokenizer("smollm2-135m").encode(TEXT).ids])


@pytest.fixture(scope="module")
def trace(model, ids):
    with torch.inference_mode():
        return model.trace(ids, read=("residual",))


@pytest.fixture(scope="module")
def theirs():
    """transformers' model and tokenizer, read by its own code from the GGUF file that was fetched."""
    import transformers

    file = pretrained.fetch("smollm2-135m") / "source.gguf"
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(**where)


def losses(logits, ids):
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


@torch.inference_mode()
def test_logits_and_residual_stream_are_those_of_transformers_on_the_same_file(model, trace, theirs, ids):
    """Relative to the largest entry. Its last hidden state is normalised: ours is compared after the norm."""
    expected = theirs[0](ids, output_hidden_states=True)
    assert difference(trace.logits, expected.logits) < 1e-4
    assert losses(trace.logits, ids).mean() == pytest.approx(
        float(losses(expected.logits, ids).mean()), abs=1e-4
    )
    assert len(expected.hidden_states) == len(trace.residual) == 31
    stream = [*trace.residual[:-1], model.norm(trace.residual[-1])]
    for l, hidden in enumerate(expected.hidden_states):
        assert difference(stream[l], hidden) < 1e-4


def difference(ours, expected):
    return (ours - expected).abs().max() / expected.abs().max()


def test_the_tokens_are_those_of_transformers(theirs):
    ours, checked = pretrained.load_tokenizer("smollm2-135m"), 0
    for text in VARIED:
        assert ours.encode(text).ids == theirs[1](text)["input_ids"], text
        checked += len(ours.encode(text).ids)
    assert checked > 150


def test_its_shape_and_facts_are_those_on_record(model):
    c = model.config
    assert (c.n_layers, c.d_model, c.n_heads, c.kv_heads, c.mlp_width) == (30, 576, 9, 3, 1536)
    assert c.vocab == 49152 and c.rope_base == 1e5 and c.norm_eps == pytest.approx(1e-5)
    assert c.tied and c.max_tokens == 8192
    facts = pretrained.source_facts("smollm2-135m")
    assert facts["parameters"] == model.n_parameters() == 134_515_008
    assert facts["licence"] == "Apache-2.0" and facts["instruction_tuned"] is True
    assert facts["stored"] == "Q4_1 and Q8_0, expanded to float32"
    assert facts["sha256"].startswith("b179c9523d0e6a0f98a330c7562b682750a6f8c8")


def test_it_has_learnt_english_and_its_stream_jumps_at_layer_12(trace, ids):
    """Loss and norms as on another paragraph (facts: 2.52 nats; norms 2.7 47 71 … 140 368 … 857)."""
    assert 2.0 < float(losses(trace.logits, ids).mean()) < 3.5
    norms = trace.residual.norm(dim=-1).mean(dim=(1, 2))  # (L + 1,)
    assert 2 < norms[0] < 4 and norms[12] / norms[11] > 2
    others = torch.cat([norms[2:12] / norms[1:11], norms[13:] / norms[12:-1]])
    assert others.max() < 2, "no other layer after the first doubles the mean norm"


@torch.inference_mode()
def test_heads_in_the_order_of_the_file_are_worse(trace, ids):
    """The negative control: query and key rows back in interleaved-pair order."""
    wrong = pretrained.load("smollm2-135m")
    for layer in wrong.layers:
        for part, heads in ((layer.attention.W_Q, 9), (layer.attention.W_K, 3)):
            part.weight.copy_(part.weight.unflatten(0, (heads, 2, 32)).transpose(1, 2).flatten(0, 2))
    assert (
        losses(wrong(ids[:, :40]), ids[:, :40]).mean()
        > losses(trace.logits[:, :40], ids[:, :40]).mean() + 0.5
    )


@torch.inference_mode()
def test_it_continues_a_sentence(model):
    tokenizer = pretrained.load_tokenizer("smollm2-135m")
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    assert tokenizer.decode([int(model(ids)[0, -1].argmax())]).strip() == "Paris"


def test_every_text_comes_back_and_digits_stand_alone():
    tokenizer = pretrained.load_tokenizer("smollm2-135m")
    for text in VARIED:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("1698").tokens == ["1", "6", "9", "8"]
    assert tokenizer.encode("<|im_start|>").ids == [1] and tokenizer.get_vocab_size() == 49152


def test_loading_is_fast_enough_for_a_page():
    """CPU seconds, which other load does not lengthen much; asked for are 2 s."""
    start = time.process_time()
    pretrained.load("smollm2-135m")
    assert time.process_time() - start < 2
