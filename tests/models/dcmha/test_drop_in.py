"""DCMHA in other people's models: copied into an empty folder, in torch's encoder layer, in a llama block.

The two classes stand here as a reader would write them.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lib.models.dcmha import DCMHA
from lib.models.transformer import Transformer, TransformerConfig
from lib.paths import ROOT


class SelfAttention(DCMHA):
    """DCMHA behind the signature of nn.MultiheadAttention(batch_first=True), for self-attention."""

    batch_first = False  # keeps nn.TransformerEncoderLayer off the fused path, which would bypass this module

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, need_weights=False, **_):
        mask = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=query.device)
        mask = mask.tril() if self.causal else mask
        if attn_mask is not None:
            mask = mask & (attn_mask == 0)  # torch writes True or -inf where a key is hidden
        if key_padding_mask is not None:
            mask = mask & (key_padding_mask == 0)[:, None]  # (B, T, T)
        return self.attend(query, mask=mask)[0], None


class LlamaBlock(nn.Module):
    """RMSNorm, attention, RMSNorm, SwiGLU: a layer of Llama, its attention composed."""

    def __init__(self, d_model=64, n_heads=8, n_kv_heads=4, d_mlp=128, **changes):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(d_model, eps=1e-5), nn.RMSNorm(d_model, eps=1e-5)
        self.attention = DCMHA(d_model, n_heads, n_kv_heads=n_kv_heads, rope=1e4, **changes)
        self.gate, self.up = (nn.Linear(d_model, d_mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm_1(x), cache=cache)
        h = self.norm_2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


# Copied into an empty folder

SCRIPT = """
import sys
sys.path = [".", *sys.path, SITE]  # -S: an editable install of this project is not on the path
try:
    import lib
except ImportError:
    import torch
else:
    raise SystemExit("lib can be imported: this test would prove nothing")
from dcmha import DCMHA
torch.manual_seed(0)
layer = DCMHA(16, 4, rope=1e4, window=8)
head = torch.nn.Linear(16, 16)
x = torch.randn(4, 12, 16)
y = x.roll(1, dims=1)  # say what stood one token earlier
y[:, 0] = 0
optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
losses = []
for step in range(60):
    loss = (head(layer(x)) - y).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
cache, layer = layer.new_cache(), layer.eval()
with torch.no_grad():
    pieces = torch.cat([layer(x[:, t:t + 1], cache=cache) for t in range(12)], dim=1)
    assert (pieces - layer(x)).abs().max() < 1e-5
print(losses[0], losses[-1])
"""


@pytest.mark.slow  # a second Python has to import torch
def test_the_file_alone_trains_in_an_empty_folder(tmp_path):
    (tmp_path / "dcmha.py").write_bytes((ROOT / "lib/models/dcmha.py").read_bytes())
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    script = f"SITE = {str(Path(torch.__file__).parents[1])!r}\n{SCRIPT}"
    command = [sys.executable, *"-I -S -W error -c".split(), script]  # no PYTHONPATH, cwd or .pth files
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, last = (float(loss) for loss in done.stdout.split())
    assert first > 0.9 and last < 0.5 * first
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["dcmha.py"]


def test_the_file_imports_torch_and_the_standard_library_only():
    tree, found = ast.parse((ROOT / "lib/models/dcmha.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    assert "torch" in found and found - {"torch", "triton"} <= set(sys.stdlib_module_names)


# torch.nn.TransformerEncoderLayer


def encoder(causal=False, norm_first=True, **changes):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.self_attn = SelfAttention(16, 4, causal=causal, **changes)
    with torch.no_grad():
        for weight in layer.self_attn.parameters():
            weight.normal_(0, 0.3)
    return layer


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer_runs_the_composed_attention_in_training_and_evaluation(norm_first, inputs):
    layer, x = encoder(norm_first=norm_first), inputs(2, 6, 16).float()
    a = layer.self_attn.attend(layer.norm1(x) if norm_first else x)[0]
    if norm_first:
        expected = x + a
        expected = expected + layer._ff_block(layer.norm2(expected))
    else:
        expected = layer.norm1(x + a)
        expected = layer.norm2(expected + layer._ff_block(expected))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # where torch's fused path would take over
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-6)


def test_torchs_masks_mean_what_they_mean_in_multihead_attention(inputs):
    x = inputs(2, 6, 16).float()
    hidden = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    plain = nn.MultiheadAttention(16, 4, batch_first=True, bias=False)
    ours = SelfAttention(16, 4, pre=False, post=False, causal=False)
    with torch.no_grad():
        for W, part in zip((ours.W_Q, ours.W_K, ours.W_V), plain.in_proj_weight.chunk(3), strict=True):
            W.weight.copy_(part)
        ours.W_O.weight.copy_(plain.out_proj.weight)
    checked = 0
    for attn_mask in (None, causal, causal < 0):
        for padding in (None, hidden):
            if attn_mask is not None and padding is not None and attn_mask.dtype != padding.dtype:
                padding = torch.zeros(2, 6).masked_fill(hidden, -torch.inf)
            masks = dict(attn_mask=attn_mask, key_padding_mask=padding, need_weights=False)
            results = (attention(x, x, x, **masks)[0] for attention in (ours, plain))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == 6


def test_a_causal_replacement_stays_causal_behind_a_padding_mask(inputs):
    layer, x = encoder(causal=True), inputs(2, 6, 16).float()
    changed, padding = x.clone(), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 0] = True
    changed[:, 3:] += 5
    before, after = (layer(each, src_key_padding_mask=padding) for each in (x, changed))
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=-1).min() > 1e-3


def test_torchs_encoder_stacks_it_hides_the_padding_and_trains_it(inputs):
    stack = nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False)
    x, hidden = inputs(2, 6, 16).float(), torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6]).bool()
    out = stack(x, src_key_padding_mask=hidden)
    changed = torch.where(hidden[..., None], x + 7, x)
    torch.testing.assert_close(stack(changed, src_key_padding_mask=hidden)[~hidden], out[~hidden])
    out[~hidden].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in stack.parameters())
    with torch.no_grad():
        torch.testing.assert_close(stack.eval()(x, src_key_padding_mask=hidden), out, rtol=1e-5, atol=1e-6)


# Llama


def test_a_llama_block_is_a_layer_of_our_transformer(inputs):
    config = TransformerConfig(
        vocab=7, d_model=64, n_heads=8, n_kv_heads=4, d_mlp=128, n_layers=1, norm="rms", norm_eps=1e-5,
        activation="swiglu", mlp_bias=False, attention="dcmha", positions="rope", rope_base=1e4,
    )  # fmt: skip
    layer, block, x = Transformer(config, seed=0).layers[0], LlamaBlock(), inputs(2, 9, 64).float()
    names = {"attention_norm": "norm_1", "mlp_norm": "norm_2"}
    names |= {"mlp.W_gate": "gate", "mlp.W_1": "up", "mlp.W_2": "down"}
    weights = {}
    for name, weight in layer.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.") if name.startswith(ours) else name
        weights[name] = weight * 3  # far from the identity
    block.load_state_dict(weights)
    layer.load_state_dict({name: weight * 3 for name, weight in layer.state_dict().items()})
    model = Transformer(config, seed=0)
    model.layers[0] = layer
    a, m = model.run_layer(0, x)
    torch.testing.assert_close(block(x), x + a + m, rtol=1e-5, atol=1e-5)


def test_a_stack_of_llama_blocks_decodes_with_one_cache_a_block(inputs):
    torch.manual_seed(0)
    windows = (3, None)  # "LG": a local layer, a global layer
    blocks = [LlamaBlock(qk_norm=True, window=window) for window in windows]
    x = inputs(1, 10, 64).float()
    full = x
    for block in blocks:
        full = block(full)
    caches = [block.attention.new_cache() for block in blocks]
    with torch.no_grad():
        pieces = []
        for h in x.split([4, 1, 1, 1, 1, 1, 1], dim=1):
            for block, cache in zip(blocks, caches, strict=True):
                h = block(h, cache)
            pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-5, atol=1e-5)
