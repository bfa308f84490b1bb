/* The calculator of the chapter on one layer: which n do the theorems exclude for a given layer?
 *
 * ProofAndProbe.largestAllowedN(heads, valueDim, widths, theorem) is lib.metrics.bounds.largest_allowed_n
 * once more, by the same algorithm, and is tested against it. ProofAndProbe.mountCalculator(elementId) puts
 * the calculator in place of the element's static content; without the element it does nothing.
 * No dependencies, no network.
 */
(function (root) {
  "use strict";

  const THEOREMS = ["B*", "B**", "B*-one-head", "B**-one-head", "generic-VC"];

  /** Largest n that `theorem` leaves possible. Throws RangeError on sizes and theorems that make no sense.
   *  options.exact: decide every inequality in integers, not only those that doubles cannot tell. */
  function largestAllowedN(heads, valueDim, widths, theorem = "B**", options = {}) {
    checkSize("heads", heads);
    checkSize("valueDim", valueDim);
    if (!Array.isArray(widths)) throw new RangeError("widths lists the hidden layers, as in [3072] or []");
    widths.forEach((width, i) => checkSize(`widths[${i}]`, width));
    if (!THEOREMS.includes(theorem)) {
      throw new RangeError(`unknown theorem ${theorem}; allowed: ${THEOREMS.join(", ")}`);
    }
    if (theorem === "generic-VC") return genericVC(heads, valueDim, widths);
    const oneHead = theorem.endsWith("one-head");
    if (oneHead && heads !== 1) throw new RangeError(`${theorem} is proved for one head, got ${heads}`);
    const k = heads * (valueDim + 1);
    const inequality = {
      k, layers: widths.length + 1, ones: oneHead ? 0 : widths.length + 1, scale: oneHead ? 1 : 2,
      divisor: valueDim + 1, widths, full: theorem.startsWith("B**"),
    };
    const violated = (n) => isViolated(inequality, n, options.exact === true);
    // "Left minus right" is convex in n and negative at n = k: the first violation begins a ray.
    let low = k, high = 2 * k;
    while (!violated(high)) [low, high] = [high, 2 * high];
    while (high - low > 1) {
      const middle = Math.floor((low + high) / 2);
      if (violated(middle)) high = middle;
      else low = middle;
    }
    return low;
  }

  function checkSize(name, value) {
    if (!Number.isSafeInteger(value) || value < 1) {
      throw new RangeError(`${name} is an integer >= 1, got ${value}`);
    }
  }

  /** left(n) > right(n)? Equality never happens (e is transcendental), so enough digits always decide. */
  function isViolated(q, n, exact) {
    if (n > Number.MAX_SAFE_INTEGER) throw new RangeError("these sizes are too large for the calculator");
    if (!exact) {
      let grows = q.layers * (Math.LOG2E + Math.log2(q.scale) + Math.log2(n));
      for (const width of q.widths) grows += Math.log2(width);
      if (q.full) grows += Math.log2(n - 1);
      const shrinks = q.layers * Math.log2(q.divisor);
      const left = q.full ? n * Math.log2(n) : n;
      const gap = left - q.ones - q.k * (grows - shrinks);
      const size = left + q.ones + q.k * (grows + shrinks);
      if (Math.abs(gap) > (20 + 2 * q.widths.length) * 2 ** -50 * size) return gap > 0;   // far from a tie
    }
    for (let bits = 128n; ; bits *= 2n) {              // the same, times ln 2, in units of 2^-bits
      const ln = (z) => lnFixed(BigInt(z), bits);
      const layers = BigInt(q.layers), N = BigInt(n), k = BigInt(q.k);
      let sum = layers * ((1n << bits) + ln(q.scale) + ln(n) - ln(q.divisor));
      for (const width of q.widths) sum += ln(width);
      if (q.full) sum += ln(n - 1);
      const gap = N * (q.full ? ln(n) : ln(2)) - BigInt(q.ones) * ln(2) - k * sum;
      const logarithms = N + BigInt(q.ones) + k * (4n * layers + 1n);       // with multiplicity
      const error = logarithms * 64n * bits;           // ln z, z < 2^53, is off by less than 64 bits units
      if (gap > error || -gap > error) return gap > 0n;
    }
  }

  /** ln z for an integer z >= 1, in units of 2^-bits: z = 2^e f, ln f = 2 artanh((f - 1) / (f + 1)). */
  function lnFixed(z, bits) {
    const e = BigInt(z.toString(2).length - 1), unit = 1n << e;
    const artanh2 = (top, bottom) => {
      const t = (top << bits) / bottom, square = (t * t) >> bits;
      let sum = 0n;
      for (let power = t, i = 1n; power > 0n; power = (power * square) >> bits, i += 2n) sum += power / i;
      return 2n * sum;
    };
    return e * artanh2(1n, 3n) + artanh2(z - unit, z + unit);
  }

  /** 4k(t+2) for k = H(d+1) parameters and t operations, the count of the page. */
  function genericVC(heads, valueDim, widths) {
    const H = BigInt(heads), d = BigInt(valueDim), sizes = [d, ...widths.map(BigInt), 1n];
    let operations = 2n * H * d + H + 2n * H * d * d + d;
    for (let i = 1; i < sizes.length; i++) operations += 2n * sizes[i - 1] * sizes[i] + 2n * sizes[i];
    const n = Number(4n * H * (d + 1n) * (operations + 2n));
    if (!Number.isSafeInteger(n)) throw new RangeError("these sizes are too large for the calculator");
    return n;
  }

  // ---- the calculator in the page ------------------------------------------------------------------------

  const INPUTS = [
    { key: "n", label: "n, size of the functions", least: 2, most: 1e6, log: true },
    { key: "heads", label: "H, heads", least: 1, most: 64, log: true },
    { key: "valueDim", label: "d, value dimension per head", least: 1, most: 1024, log: true },
    { key: "depth", label: "hidden layers of the MLP", least: 0, most: 12, log: false },
    { key: "width", label: "width of each hidden layer", least: 1, most: 16384, log: true },
  ];
  const EXAMPLES = [
    { name: "one small head", n: 32, heads: 1, valueDim: 4, depth: 1, width: 64 },
    { name: "one head, no MLP", n: 2, heads: 1, valueDim: 64, depth: 0, width: 64 },
    { name: "GPT-2-small’s sizes, ReLU, no norm", n: 3000, heads: 12, valueDim: 64, depth: 1, width: 3072 },
  ];

  /** Theorems that apply to the layer, each with the least n it excludes. */
  function thresholds(state) {
    const widths = Array(state.depth).fill(state.width);
    const first = (theorem) => largestAllowedN(state.heads, state.valueDim, widths, theorem) + 1;
    const one = state.heads === 1;
    const rows = [];
    if (one && state.depth === 0) rows.push({ name: "one head, no MLP", first: 2 });
    if (one) rows.push({ name: "B** (one head)", first: first("B**-one-head") });
    rows.push({ name: "B**", first: first("B**") });
    if (one) rows.push({ name: "B* (one head)", first: first("B*-one-head") });
    rows.push({ name: "B*", first: first("B*") }, { name: "generic VC (our count)", first: first("generic-VC") });
    return rows;
  }

  function mountCalculator(elementId) {
    const host = root.document && root.document.getElementById(elementId);
    if (!host) return null;
    addStyle();
    const state = { ...EXAMPLES[0] };
    host.replaceChildren();
    host.classList.add("pp-calculator");
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", "Calculator: which n do the theorems exclude?");

    const controls = element("div", { class: "pp-controls" });
    const fields = INPUTS.map((input) => field(elementId, input, state, update));
    fields.forEach((one) => controls.append(one.row));
    const examples = element("p", { class: "pp-examples" }, "Try: ");
    EXAMPLES.forEach((example) => {
      const button = element("button", { type: "button" }, example.name);
      button.addEventListener("click", () => update(Object.assign(state, example)));
      examples.append(button, " ");
    });
    const verdict = element("p", { class: "pp-verdict", "aria-live": "polite" });
    const picture = element("div", { class: "pp-picture" });
    const body = element("tbody");
    const head = element("tr");
    ["theorem", "excludes every n from", "your n"].forEach((text) => {
      head.append(element("th", { scope: "col" }, text));
    });
    const table = element("table", { class: "pp-table" });
    table.append(element("thead"), body);
    table.tHead.append(head);
    host.append(controls, examples, verdict, picture, table);

    function update() {
      fields.forEach((one) => one.show());
      const wrong = fields.map((one) => one.complaint()).filter(Boolean);
      if (wrong.length) {
        verdict.textContent = wrong.join(" ");
        return;
      }
      const rows = thresholds(state);
      say(verdict, state, rows);
      picture.replaceChildren(draw(state, rows, picture.clientWidth || 640));
      body.replaceChildren(...rows.map((row) => {
        const line = element("tr");
        line.append(
          element("th", { scope: "row" }, row.name), element("td", {}, format(row.first)),
          element("td", {}, state.n >= row.first ? "impossible" : "not excluded"));
        return line;
      }));
    }

    update();
    if (root.ResizeObserver) {
      let width = picture.clientWidth;
      new root.ResizeObserver(() => {
        if (picture.clientWidth !== width) {
          width = picture.clientWidth;
          update();
        }
      }).observe(picture);
    }
    return host;
  }

  /** One labelled number and its slider; on a log scale the slider walks through distinct integers. */
  function field(elementId, input, state, update) {
    const steps = [];
    const octaves = input.log ? Math.log2(input.most) : 0;
    for (let i = 0; input.log && i <= 4 * octaves; i++) steps.push(Math.round(2 ** (i / 4)));
    for (let i = input.least; !input.log && i <= input.most; i++) steps.push(i);
    const values = [...new Set([...steps, input.most])].filter((v) => v >= input.least && v <= input.most);
    const id = `${elementId}-${input.key}`;
    const number = element("input", {
      id, type: "number", min: input.least, max: input.most, step: 1, inputmode: "numeric",
    });
    const slider = element("input", {
      type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": `${input.label}, slider`,
    });
    const row = element("div", { class: "pp-field" });
    row.append(element("label", { for: id }, input.label), slider, number);
    let bad = false;

    slider.addEventListener("input", () => {
      bad = false;
      state[input.key] = values[Number(slider.value)];
      update();
    });
    number.addEventListener("input", () => {
      const value = Number(number.value);
      bad = number.value.trim() === "" || !Number.isInteger(value);
      bad = bad || value < input.least || value > input.most;
      if (!bad) state[input.key] = value;
      update();
    });

    function show() {
      const value = state[input.key];
      if (Number(number.value) !== value && !bad) number.value = value;
      let nearest = 0;
      values.forEach((v, i) => {
        if (Math.abs(v - value) < Math.abs(values[nearest] - value)) nearest = i;
      });
      slider.value = nearest;
      slider.setAttribute("aria-valuetext", String(value));
      number.setAttribute("aria-invalid", String(bad));
      const idle = input.key === "width" && state.depth === 0;
      slider.disabled = number.disabled = idle;
    }
    const complaint = () => bad &&
      `${input.label}: a whole number from ${format(input.least)} to ${format(input.most)} is needed.`;
    return { row, show, complaint };
  }

  function say(verdict, state, rows) {
    const best = rows.reduce((a, b) => (b.first < a.first ? b : a));
    const impossible = state.n >= best.first;
    verdict.dataset.verdict = impossible ? "impossible" : "not excluded";
    const strong = element("strong", {}, impossible ? "impossible" : "not excluded");
    const name = element("i", {}, "Comp");
    name.append(element("sub", {}, "n"));
    const first = format(best.first);
    const why = impossible
      ? ` for this layer at any precision, with any weights: ${best.name} excludes every n from ${first}.`
      : ` for this layer: the sharpest bound here, ${best.name}, begins at n = ${first}. ` +
        "That does not say that such a layer exists.";
    verdict.replaceChildren(name, ` with n = ${format(state.n)} is `, strong, why);
  }

  /** The number line of n, logarithmic, with the excluded ray of every theorem. */
  function draw(state, rows, width) {
    const decades = Math.ceil(Math.log10(1.2 * Math.max(1000, state.n, ...rows.map((row) => row.first))));
    const left = 8, right = width - 12, top = 30, step = 38, bottom = top + step * rows.length;
    const at = (n) => left + (right - left) * Math.log10(n) / decades;
    const said = rows.map((row) => `${row.name} excludes every n from ${format(row.first)}`).join("; ");
    const svg = element("svg", {
      viewBox: `0 0 ${width} ${bottom + 26}`, width, height: bottom + 26, role: "img",
      "aria-label": `Number line of n from 1 to 10^${decades}. ${said}. Your n is ${format(state.n)}.`,
    }, null);
    const x = at(state.n), edge = x > width / 2, names = [];
    rows.forEach((row, i) => {
      const y = top + step * i;
      names.push(element("text", { x: left, y: y + 12 }, `${row.name}: from ${format(row.first)}`));
      svg.append(
        element("rect", { x: left, y: y + 18, width: right - left, height: 12, class: "pp-track" }),
        element("rect", {
          x: at(row.first), y: y + 18, width: right - at(row.first), height: 12, class: "pp-excluded",
        }));
    });
    svg.append(
      element("line", { x1: x, x2: x, y1: 6, y2: bottom, class: "pp-chosen" }), ...names,
      element("text", {
        x: x + (edge ? -6 : 6), y: 16, "text-anchor": edge ? "end" : "start", class: "pp-yours",
      }, `your n = ${format(state.n)}`));
    const every = width < 480 && decades > 7 ? 2 : 1;
    for (let i = 0; i <= decades; i += every) {
      const tick = at(10 ** i), anchor = i === 0 ? "start" : i === decades ? "end" : "middle";
      const label = element("text", { x: tick, y: bottom + 20, "text-anchor": anchor }, i === 0 ? "1" : "10");
      if (i > 1) label.append(element("tspan", { dy: -5, class: "pp-power" }, String(i)));
      const mark = { x1: tick, x2: tick, y1: bottom, y2: bottom + 6, class: "pp-axis" };
      svg.append(element("line", mark), label);
    }
    svg.append(element("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "pp-axis" }));
    return svg;
  }

  const SVG_NAMES = new Set(["svg", "text", "tspan", "rect", "line"]);

  function element(name, attributes = {}, text = null) {
    const made = SVG_NAMES.has(name)
      ? root.document.createElementNS("http://www.w3.org/2000/svg", name)
      : root.document.createElement(name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== null) made.append(text);
    return made;
  }

  function format(n) {
    return n.toLocaleString("en-US");
  }

  function addStyle() {
    if (root.document.getElementById("pp-calculator-style")) return;
    root.document.head.append(element("style", { id: "pp-calculator-style" }, `
.pp-calculator { --ink: var(--pst-color-text-base, #222832); --accent: var(--pst-color-primary, #0a7d91);
  --edge: var(--pst-color-border, #c9c9c9); --ground: var(--pst-color-surface, #f5f5f5);
  color: var(--ink); background: var(--ground); border: 1px solid var(--edge); border-radius: .5rem;
  padding: 1rem; margin: 1.5rem 0; box-sizing: border-box; }
.pp-calculator * { box-sizing: border-box; }
.pp-field { display: grid; grid-template-columns: 14.5rem 1fr 6.5rem; gap: .25rem .75rem;
  align-items: center; margin-bottom: .4rem; }
.pp-field label { margin: 0; }
.pp-field input[type=range] { width: 100%; min-width: 0; margin: 0; accent-color: var(--accent); }
.pp-field input[type=number] { width: 100%; min-width: 0; padding: .2rem .4rem; font: inherit;
  color: var(--ink); background: transparent; border: 1px solid var(--edge); border-radius: .25rem; }
.pp-field input[aria-invalid=true] { outline: 2px solid currentColor; }
.pp-field input:disabled { opacity: .5; }
.pp-calculator :is(input, button):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.pp-examples { margin: .75rem 0; font-size: .9rem; }
.pp-examples button { font: inherit; color: var(--ink); background: transparent; cursor: pointer;
  border: 1px solid var(--edge); border-radius: .25rem; padding: .15rem .5rem; margin: .15rem .1rem; }
.pp-examples button:hover { border-color: var(--accent); }
.pp-verdict { margin: .75rem 0; padding: .5rem .75rem; border-left: 4px solid var(--accent);
  font-size: 1.05rem; }
.pp-picture { width: 100%; overflow: hidden; }
.pp-picture svg { display: block; max-width: 100%; }
.pp-picture text { fill: var(--ink); font-size: 12px; font-family: inherit;
  paint-order: stroke; stroke: var(--ground); stroke-width: 4px; }
.pp-picture .pp-power { font-size: 9px; stroke: none; }
.pp-picture .pp-yours { font-weight: 600; }
.pp-track { fill: none; stroke: var(--edge); }
.pp-excluded { fill: var(--accent); fill-opacity: .55; stroke: var(--accent); }
.pp-axis { stroke: var(--ink); }
.pp-chosen { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 5 3; }
.pp-table { width: 100%; border-collapse: collapse; margin: .75rem 0 0; font-size: .9rem; color: var(--ink); }
.pp-table th, .pp-table td { text-align: left; font-weight: normal; padding: .25rem .5rem;
  border-bottom: 1px solid var(--edge); background: transparent; }
.pp-table thead th { font-weight: 600; }
.pp-table td:nth-child(2) { font-variant-numeric: tabular-nums; }
@media (max-width: 600px) {
  .pp-calculator { padding: .75rem; }
  .pp-field { grid-template-columns: 1fr 6rem; margin-bottom: .6rem; }
  .pp-field label { grid-column: 1 / -1; }
}`));
  }

  const known = { largestAllowedN, mountCalculator, THEOREMS };
  root.ProofAndProbe = Object.assign(root.ProofAndProbe || {}, known);
})(typeof globalThis !== "undefined" ? globalThis : this);
