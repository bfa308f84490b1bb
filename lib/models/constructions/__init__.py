"""Hand-built one-layer softmax transformers that compose functions, and one that finds cancelling pairs.

The weights are written as named affine forms, so a line of code is a line of the proof. Propositions T and T'
and the SUM2 counter are proved in `one-layer-limits` (ours, unrefereed); 0-based here, 1-based on the page.

The idea of Proposition T: head 1 looks up g(x). Head 2 is uniform and looks up nothing: it adds up the whole
table of h, packed as digits in base 2n, s digits to a coordinate. The MLP picks the coordinate that holds
h(g(x)) and peels off its digits one a layer. A wider value (small s) or a deeper MLP (large s): the product
H (d + 1) (hidden layers + 1) stays about 2n.

The deep constructions for sequential composition are in `sequential`, and are run by `reading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from lib.models.constructions.reading import decode, margin, sequential_composition
from lib.models.constructions.sequential import (
    layout,
    least_sharpness,
    sequential_composition_decoder,
    sequential_composition_encoder,
    sequential_composition_scratchpad,
)
from lib.models.named_weights import Form, Head, Layer, Number, coordinates
from lib.models.one_layer import OneLayerSoftmax

__all__ = [
    "decode", "layout", "least_sharpness", "margin", "proposition_t", "proposition_t_many_heads",
    "proposition_t_many_heads_binary", "sequential_composition", "sequential_composition_decoder",
    "sequential_composition_encoder", "sequential_composition_scratchpad", "sum2_counter",
]

HALF = Fraction(1, 2)


def proposition_t(n: int, s: int) -> OneLayerSoftmax:
    """Proposition T: Comp_n with two heads, exactly, for every input.

    H = 2, value dimension d = ceil(n/s), s + 3 hidden layers, width at most max(2n+5, 2(n-1) + d). A word is
    2n+1 tokens g(0)..g(n-1), h(0)..h(n-1), x; y = h(g(x)). Raises ValueError unless n >= 2 and 1 <= s <= n.
    The pointer's weight is (32 n)^(-(p-x)²). Source: proved in `one-layer-limits` (ours, unrefereed).
    """
    _check_integers(n=n, s=s)
    if not 1 <= s <= n or n < 2:
        raise ValueError(f"Proposition T needs n >= 2 and a block size 1 <= s <= n, got n={n}, s={s}")
    d, Q = -(-n // s), 2 * n

    def embed(position: int, symbol: int) -> Mapping[str, Number]:
        token = {"one": 1, "p": position, "p²": position**2}
        if position < n:
            return token | {"g(p)": symbol}
        if position == 2 * n:
            return token | {"x": symbol, "x²": symbol**2}
        block, offset = divmod(position - n, s)
        # 2n + 1 tokens share a uniform head's weight: multiplying by 2n + 1 makes the mean a sum
        return token | {f"table {block}": Fraction((2 * n + 1) * symbol, Q ** (offset + 1))}

    one, p, p2, g, x, x2 = coordinates("one", "p", "p²", "g(p)", "x", "x²")
    tables = coordinates(*(f"table {b}" for b in range(d)))
    pointer = Head(name="pointer", base=32 * n, query=(2 * x, -one, -x2), key=(p, p2, one), value=(g,))
    table = Head(name="table", base=1, query=(), key=(), value=tuple(tables))
    y, *v = coordinates("y", *(f"v{b}" for b in range(d)))
    W_O = {"y": coordinates(pointer.output(0))[0]}
    W_O |= {f"v{b}": coordinates(table.output(b))[0] for b in range(d)}

    stairs, reaches = _staircase("g(x)", y, range(1, n))             # reaches[k] = 1 if g(x) >= k, else 0
    copies = {f"v{b}": v[b] for b in range(d)}                       # v_b >= 0: a ReLU copies it
    in_block = _indicators({b: reaches[b * s] for b in range(1, d)}, d)
    offset = _total(reaches.values()) - s * _total(reaches[b * s] for b in range(1, d))
    select, u, offset = _select(v, in_block, offset)
    digits, answer = _peel_digits(u, offset, n, s)
    return OneLayerSoftmax(
        name=f"Proposition T, n={n}, s={s}", alphabet=(n,) * (2 * n + 1), embed=embed,
        features=("one", "p", "p²", "g(p)", "x", "x²", *(f"table {b}" for b in range(d))),
        heads=(pointer, table), W_O=W_O, hidden=(stairs | copies, select, *digits), output=answer)


def proposition_t_many_heads(S: int, nu: int, s: int) -> OneLayerSoftmax:
    """Proposition T': Comp_n, n = S·nu·s, with S + 1 heads: the banks of the table are switched by scores.

    H = S + 1, d = max(nu, 2), s + 3 hidden layers. Words as in `proposition_t`. Raises ValueError unless
    S, nu, s >= 1 and n >= 2. Source: proved in `one-layer-limits` (ours, unrefereed).
    """
    n = _many_heads_size(S, nu, s)
    return _many_heads("", S, nu, s, base=2 * n, digits=lambda symbol: [symbol], peel=_peel_digits)


def proposition_t_many_heads_binary(S: int, nu: int, s: int) -> OneLayerSoftmax:
    """Proposition T' with binary digits in base 4: few neurons, more layers.

    As `proposition_t_many_heads`, but s·ceil(log2 n) + 3 hidden layers of width O(nu + s + log n).
    """
    n = _many_heads_size(S, nu, s)
    tau = (n - 1).bit_length()
    return _many_heads(", binary", S, nu, s, base=4, peel=_peel_bits,
                       digits=lambda symbol: [symbol >> (tau - 1 - t) & 1 for t in range(tau)])


def _many_heads_size(S: int, nu: int, s: int) -> int:
    _check_integers(S=S, nu=nu, s=s)
    if min(S, nu, s) < 1 or S * nu * s < 2:
        raise ValueError(f"Proposition T' needs S, nu, s >= 1 and n = S·nu·s >= 2, got {S}·{nu}·{s}")
    return S * nu * s


def _many_heads(variant: str, S: int, nu: int, s: int, *, base: int, digits: Callable[[int], list[int]],
                peel: Callable[[Form, Form, int, int], tuple[list[Layer], Form]]) -> OneLayerSoftmax:
    n = S * nu * s
    E = 64 * n * S * (2 * n) ** (2 * s)              # a wrong bank weighs 1/E; C = E³ is the pointer's base

    def place(i: int) -> tuple[int, int, int]:       # i -> (bank, block, offset)
        return i // (nu * s), i // s % nu, i % s

    def embed(position: int, symbol: int) -> Mapping[str, Number]:
        if position < n:                             # a g-token: mutes every bank but the one it points into
            bank, block, offset = place(symbol)
            token = {"g": 1, "g·p": position, "g·p²": position**2, "block": block, "offset": offset}
            return token | {f"switch {b}": -1 if b == bank else 1 for b in range(S)}
        if position == 2 * n:
            token = {"one": 1, "x": symbol, "x²": symbol**2, "not g": 1}
            return token | {f"switch {b}": -1 for b in range(S)}
        bank, block, offset = place(position - n)
        packed = sum(Fraction(digit, base ** (offset * len(digits(symbol)) + t + 1))
                     for t, digit in enumerate(digits(symbol)))
        switch = {f"switch {b}": 0 if b == bank else -1 for b in range(S)}
        return {"not g": 1, f"table {block}": nu * s * packed} | switch

    one, x, x2, g, gp, gp2, off_g = coordinates("one", "x", "x²", "g", "g·p", "g·p²", "not g")
    at_x = (6 * x, -3 * one, -3 * x2)                # against (p, p², 1): -3(p-x)², that is C^(-(p-x)²)
    pointer = Head(name="pointer", base=E, query=(*at_x, -4 * one), key=(gp, gp2, g, off_g),
                   value=tuple(coordinates("block", "offset")))
    tables = coordinates(*(f"table {t}" for t in range(nu)))
    banks = [Head(name=f"bank {b}", base=E, query=(*at_x, one), key=(gp, gp2, g, *coordinates(f"switch {b}")),
                  value=tuple(tables)) for b in range(S)]
    W_O = dict(zip(("block", "offset"), coordinates(pointer.output(0), pointer.output(1)), strict=True))
    W_O |= {f"v{t}": _total(coordinates(*(bank.output(t) for bank in banks))) for t in range(nu)}

    block, offset, *v = coordinates("block", "offset", *(f"v{t}" for t in range(nu)))
    block_stairs, reaches = _staircase("block", block, range(1, nu))
    offset_stairs, beyond = _staircase("offset", offset, range(1, s))
    copies = {f"v{t}": v[t] for t in range(nu)}
    select, u, offset = _select(v, _indicators(reaches, nu), _total(beyond.values()))
    decode, answer = peel(u, offset, n, s)
    features = ("one", "x", "x²", "g", "g·p", "g·p²", "not g", "block", "offset",
                *(f"switch {b}" for b in range(S)), *(f"table {t}" for t in range(nu)))
    return OneLayerSoftmax(
        name=f"Proposition T'{variant}, S={S}, nu={nu}, s={s}", alphabet=(n,) * (2 * n + 1),
        features=features, embed=embed, heads=(pointer, *banks), W_O=W_O,
        hidden=(block_stairs | offset_stairs | copies, select, *decode), output=answer)


def sum2_counter(n: int, M: int) -> OneLayerSoftmax:
    """SUM2[n, M] with one uniform head that counts residues: y > 0 iff some j < k have x_j + x_k = 0 mod M.

    H = 1, d = M, one hidden layer. With c_r the number of tokens of residue r,
    y = Σ_{0<r<M/2} min(c_r, c_{M-r}) + ReLU(c_0 - 1) + [M even] ReLU(c_{M/2} - 1);
    min(a, b) = a - ReLU(a - b). The MLP is strictly layered, so one neuron carries Σ c_r past it:
    floor(M/2) + 2 neurons for M >= 3. A word is n residues, then the auxiliary symbol M.
    Raises ValueError unless n >= 2 and M >= 2. Source: proved in `one-layer-limits` (ours, unrefereed).
    """
    _check_integers(n=n, M=M)
    if n < 2 or M < 2:
        raise ValueError(f"SUM2 needs two numbers and a modulus of at least 2, got n={n}, M={M}")

    def embed(position: int, symbol: int) -> Mapping[str, Number]:
        return {f"residue {symbol}": n + 1} if position < n else {}   # n + 1 tokens share the weight

    features = tuple(f"residue {r}" for r in range(M))
    head = Head(name="count", base=1, query=(), key=(), value=tuple(coordinates(*features)))
    count = coordinates(*(f"c{r}" for r in range(M)))
    pairs = range(1, (M + 1) // 2)
    hidden = {f"c{r} - c{M - r}": count[r] - count[M - r] for r in pairs}
    output = -1 * _total(coordinates(*hidden))
    if pairs:
        hidden["carried"] = _total(count[r] for r in pairs)
        output += coordinates("carried")[0]
    for own in (0, M // 2) if M % 2 == 0 else (0,):                   # a residue that is its own partner
        hidden[f"c{own} - 1"] = count[own] - 1
        output += coordinates(f"c{own} - 1")[0]
    return OneLayerSoftmax(
        name=f"SUM2 counter, n={n}, M={M}", alphabet=(M,) * n + (M + 1,), features=features, embed=embed,
        heads=(head,), W_O={f"c{r}": coordinates(head.output(r))[0] for r in range(M)},
        hidden=(hidden,), output=output)


# ---- gadgets: each returns neurons of one layer, and the forms in which the next layer reads them --------


def _staircase(what: str, z: Form, levels: Iterable[int]) -> tuple[Layer, dict[int, Form]]:
    """1[z >= k] for each level k: exactly 1 if z >= k - 1/8, exactly 0 if z <= k - 3/8. Two ReLUs a level."""
    neurons, reaches = {}, {}
    for k in levels:
        high, low = f"{what} >= {k}, high", f"{what} >= {k}, low"
        neurons[high] = 4 * (z - k) + 3 * HALF
        neurons[low] = 4 * (z - k) + HALF
        reaches[k] = _difference(high, low)
    return neurons, reaches


def _indicators(reaches: Mapping[int, Form], count: int) -> list[Form]:
    """1[block = b] for b in 0 .. count-1, from reaches[b] = 1[block >= b]."""
    at_least = [Form(bias=1), *(reaches[b] for b in range(1, count)), Form()]
    return [at_least[b] - at_least[b + 1] for b in range(count)]


def _select(v: list[Form], in_block: list[Form], offset: Form) -> tuple[Layer, Form, Form]:
    """The layer that keeps v[b] of the right block (all v < 2) and carries the offset."""
    kept = {f"v{b} if in block {b}": v[b] - 2 * (1 - in_block[b]) for b in range(len(v))}
    return kept | {"offset": offset}, _total(coordinates(*kept)), coordinates("offset")[0]


def _peel_digits(u: Form, offset: Form, n: int, s: int) -> tuple[list[Layer], Form]:
    """u = Σ_o digit_o (2n)^(-o-1) -> the digit at `offset`: one layer a digit, one more to add up."""
    Q, layers, answer = 2 * n, [], Form()
    gate: Layer = {}                                                  # the previous digit, if it is the one
    for j in range(s):
        stairs, reaches = _staircase(f"digit {j}", Q * u, range(1, n))    # Q u = digit + rest, rest < 1/2
        carriers = {"u + 1": u + 1, "offset": offset, "sum": answer}
        layers.append(stairs | _hat(offset - j) | carriers | gate)
        answer = _total(coordinates("sum", *gate))
        digit = _total(reaches.values())
        gate = {"gate": digit - n * (1 - _hat_reading())}
        carried, offset = coordinates("u + 1", "offset")
        u = Q * (carried - 1) - digit
    layers.append({"sum": answer} | gate)
    return layers, _total(coordinates("sum", "gate"))


def _peel_bits(u: Form, offset: Form, n: int, s: int) -> tuple[list[Layer], Form]:
    """The same in base 4 with binary digits, most significant first: ceil(log2 n) layers a table entry."""
    tau, layers, answer = (n - 1).bit_length(), [], Form()
    gate: Layer = {}
    for j in range(s):
        value = Form()
        for t in range(tau):
            # a leading 0 leaves u <= 1/12, a leading 1 makes u >= 1/4; the ramp rises from 1/8 to 5/24
            ramp = {"bit, high": 12 * u - 3 * HALF, "bit, low": 12 * u - 5 * HALF}
            carriers = {"u + 1": u + 1, "offset": offset, "sum": answer, "value": value}
            hat = _hat(offset - j) if t == tau - 1 else {}
            layers.append(ramp | hat | carriers | (gate if t == 0 else {}))
            answer = _total(coordinates("sum", *(gate if t == 0 else {})))
            bit = _difference("bit, high", "bit, low")
            carried, offset, value = coordinates("u + 1", "offset", "value")
            u, value = 4 * (carried - 1) - bit, value + 2 ** (tau - 1 - t) * bit
        gate = {"gate": value - n * (1 - _hat_reading())}
    layers.append({"sum": answer} | gate)
    return layers, _total(coordinates("sum", "gate"))


def _hat(t: Form) -> Layer:
    return {"hat, left": t + 1, "hat, middle": t, "hat, right": t - 1}


def _hat_reading() -> Form:
    """1[t = 0] for integers t, from the three ReLUs of `_hat`."""
    left, middle, right = coordinates("hat, left", "hat, middle", "hat, right")
    return left - 2 * middle + right


def _difference(high: str, low: str) -> Form:
    return Form({high: 1, low: -1})


def _total(forms: Iterable[Form]) -> Form:
    return sum(forms, start=Form())


def _check_integers(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{name} must be an integer, got {size!r}")
