/* The hand-built decoder of the chapter on depth and width, run in the page, one layer at a time.
 *
 * ProofAndProbe.runDecoder(data, input) is the forward pass on the weights that lib.figures.stepper exports,
 * tested against torch on every input. ProofAndProbe.mountStepper(elementId, data) puts the stepper in place of
 * the element's static content; without the element it does nothing. Styles: book.css. No dependencies.
 *
 * data: see lib.figures.stepper.stepper_data. input: {z0, tables: [z_1 … z_L], w: [w_1 … w_{L-1}], sharpness},
 * sharpness as a multiple of the proved c*, by default that of the weights. Numbers count from 0.
 */
(function (root) {
  "use strict";

  // ---- the task: its prompt and its definition -------------------------------------------------------------

  /** The tokens z_L, …, z_1, z_0, w of a prompt: {part, place, symbols}; place (i), (w, i) or ().  */
  function promptTokens(task, input) {
    const tokens = [];
    for (let l = task.N.length; l >= 1; l--) {
      const inner = l >= 2 ? task.N[l - 2] : task.N[l - 1];
      for (let j = 0; j < task.N[l - 1]; j++) {
        const w = Math.floor(j / inner), i = j % inner, value = input.tables[l - 1][j];
        const at = l >= 2 ? [`at w_${l - 1}=${w}`] : [];
        tokens.push({
          part: `z_${l}`, place: l >= 2 ? [w, i] : [i],
          symbols: [`z_${l}`, ...at, `at i=${i}`, `value ${value}`],
        });
      }
    }
    tokens.push({ part: "z_0", place: [], symbols: ["z_0", `value ${input.z0}`] });
    tokens.push({ part: "w", place: [], symbols: ["w", ...input.w.map((v, l) => `w_${l + 1}=${v}`)] });
    return tokens;
  }

  /** i_0 … i_L from the tables alone: i_1 = z_1(i_0), i_{l+1} = z_{l+1}(w_l, i_l). */
  function definition(task, input) {
    const steps = [input.z0];
    input.tables.forEach((table, l) => {
      steps.push(table[l === 0 ? steps[l] : input.w[l - 1] * task.N[l - 1] + steps[l]]);
    });
    return steps;
  }

  /** How many values each number of an input has, in counting order: z_L(0) first, w_{L-1} last. */
  function bases(task) {
    return [...[...task.N].reverse().flatMap((N) => Array(N).fill(N)), task.m, ...task.ns];
  }

  function inputFromDigits(task, digits) {
    const left = digits.slice(), tables = [];
    for (let l = task.N.length; l >= 1; l--) tables.unshift(left.splice(0, task.N[l - 1]));
    return { z0: left[0], tables, w: left.slice(1) };
  }

  /** The input with this number, as `SequentialComposition.all_inputs` counts. */
  function inputFromNumber(task, number) {
    const digits = bases(task).reverse().map((base) => {
      const digit = number % base;
      number = Math.floor(number / base);
      return digit;
    });
    return inputFromDigits(task, digits.reverse());
  }

  function checkInput(task, input) {
    const check = (name, value, n) => {
      if (Number.isInteger(value) && value >= 0 && value < n) return;
      throw new RangeError(`${name} is an integer from 0 to ${n - 1}, got ${value}`);
    };
    if (!Array.isArray(input.tables) || input.tables.length !== task.N.length ||
        input.tables.some((table, l) => table.length !== task.N[l]) || input.w.length !== task.ns.length) {
      throw new RangeError(`an input has tables of sizes ${task.N} and ${task.ns.length} switches`);
    }
    check("z0", input.z0, task.m);
    input.tables.forEach((table, l) => table.forEach((v, j) => check(`z_${l + 1}[${j}]`, v, task.N[l])));
    input.w.forEach((v, l) => check(`w_${l + 1}`, v, task.ns[l]));
    if (input.sharpness !== undefined && !(input.sharpness > 0 && input.sharpness < Infinity)) {
      throw new RangeError(`sharpness is a positive multiple of c*, got ${input.sharpness}`);
    }
  }

  // ---- the decoder -----------------------------------------------------------------------------------------

  /** One pass. For the token w, the last: attention and score [layers][T], query [layers][d_head], residual
   *  [layers + 1][D], middle [layers][D] (between attention and MLP), and the logits. RangeError on nonsense. */
  function runDecoder(data, input) {
    checkInput(data.task, input);
    const row = new Map(data.symbols.map((name, i) => [name, i])), embedding = rows(data.embedding);
    let h = promptTokens(data.task, input).map((token) => {                      // (T, D)
      const sum = Array(data.embedding.columns).fill(0);
      token.symbols.forEach((name) => embedding[row.get(name)].forEach(([column, x]) => (sum[column] += x)));
      return sum;
    });
    const T = h.length, last = T - 1;
    const sharper = (input.sharpness ?? data.sharpness.multiple) / data.sharpness.multiple;
    const run = { attention: [], score: [], query: [], middle: [], residual: [h[last]] };
    for (const layer of data.layers) {
      const q = h.map((x) => apply(layer.W_Q, x).map((entry) => sharper * entry));
      const k = h.map((x) => apply(layer.W_K, x)), v = h.map((x) => apply(layer.W_V, x));
      const score = q.map((one, t) => k.slice(0, t + 1).map((key) => dot(one, key) / Math.sqrt(data.d_head)));
      const weight = score.map(softmax);                                         // causal: t reads 0 … t
      const middle = h.map((x, t) => {
        const mix = Array(data.d_head).fill(0);
        weight[t].forEach((share, s) => v[s].forEach((entry, i) => (mix[i] += share * entry)));
        return add(x, apply(layer.W_O, mix));
      });
      h = middle.map((x) => {
        const open = apply(layer.W_1, x, layer.b_1).map((entry) => Math.max(0, entry));
        return add(x, apply(layer.W_2, open, layer.b_2));
      });
      run.attention.push(weight[last]);
      run.score.push(score[last]);
      run.query.push(q[last]);
      run.middle.push(middle[last]);
      run.residual.push(h[last]);
    }
    return { ...run, logits: apply(data.W_U, h[last]) };
  }

  function rows(matrix) {
    const found = Array.from({ length: matrix.rows }, () => []);
    for (const [row, column, weight] of matrix.entries) found[row].push([column, weight]);
    return found;
  }

  function apply(matrix, x, bias = null) {
    const y = bias ? bias.slice() : Array(matrix.rows).fill(0);
    for (const entry of matrix.entries) y[entry[0]] += entry[2] * x[entry[1]];
    return y;
  }

  const dot = (x, y) => x.reduce((sum, entry, i) => sum + entry * y[i], 0);
  const add = (x, y) => x.map((entry, i) => entry + y[i]);
  const largest = (x) => x.indexOf(Math.max(...x));

  function softmax(scores) {
    const top = Math.max(...scores), powers = scores.map((score) => Math.exp(score - top));
    const total = powers.reduce((sum, power) => sum + power, 0);
    return powers.map((power) => power / total);
  }

  /** Is the input answered wrongly at this sharpness? */
  function isWrong(data, input) {
    return largest(runDecoder(data, input).logits) !== definition(data.task, input).at(-1);
  }

  // ---- the stepper in the page -----------------------------------------------------------------------------

  const COUNTABLE = 20000;   // inputs that are all tried at every sharpness
  const MOMENTS = ["before", "+ attention", "+ MLP"];

  function mountStepper(elementId, data) {
    const host = root.document && root.document.getElementById(elementId);
    if (!host) return null;
    const layers = data.layers.length, task = data.task;
    const start = () => ({ input: copy(data.input), sharpness: data.sharpness.multiple, step: 1 });
    const state = start();
    host.replaceChildren();
    host.classList.add("pp-stepper");
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", `A decoder of ${layers} layers, to step through`);

    const show = () => update();
    const prompt = promptView(state, data, show);
    const tools = element("div", { class: "pp-tools" });
    tools.append(
      button("Another input", () => { state.input = otherInput(task, state.input); show(); }),
      button("Reset", () => { Object.assign(state, start()); show(); }),
      element("span", { class: "pp-hint" }, key()));
    const steps = stepView(layers, (step) => { state.step = step; show(); });
    const asks = element("div", { class: "pp-asks" });
    const stream = streamView(data), result = resultView(data);
    const verdict = element("p", { class: "pp-verdict", "aria-live": "polite", "aria-atomic": "true" });
    const panels = element("div", { class: "pp-panels" });
    panels.append(stream.box, result.box);
    const slider = sharpnessView(elementId, state, data, show);
    host.append(prompt.box, tools, steps.box, asks, verdict, panels, slider.box);

    host.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way || event.target.type === "range" || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      state.step = Math.min(layers, Math.max(0, state.step + way));
      show();
    });

    function update() {
      const run = runDecoder(data, { ...state.input, sharpness: state.sharpness });
      const truth = definition(task, state.input), t = state.step - 1;
      const read = run.residual.slice(1).map((h) => readBits(data, h, "current"));
      const c = state.sharpness * data.sharpness.least;
      prompt.show(run, t, c);
      steps.show(state.step);
      asks.replaceChildren(...asked(data, run, t, c));
      stream.show(run, t, truth);
      result.show(run, truth, read, state.step);
      host.dataset.answer = largest(run.logits);
      const said = say(state, data, run, truth, read);
      if (verdict.textContent !== said.textContent) verdict.replaceChildren(said);
      const fine = state.step === 0 || (state.step < layers ? read[t] : largest(run.logits)) === truth[t];
      verdict.dataset.verdict = state.step === 0 ? "none" : fine ? "right" : "wrong";
      slider.show();
    }

    update();
    if (root.ResizeObserver) {
      const watch = new root.ResizeObserver(() => prompt.arcs());   // cells move within a box that does not
      prompt.parts.forEach((part) => watch.observe(part));
    }
    return host;
  }

  /** The prompt, grouped by table: what each token is, its value as a button, and how w's head weighs it. */
  function promptView(state, data, show) {
    const { task } = data, box = element("div", { class: "pp-prompt" }), cells = [];
    const sky = element("svg", { class: "pp-arcs", "aria-hidden": "true" });
    box.append(sky);
    const frames = [];
    let group = null, weights = null;
    promptTokens(task, data.input).forEach((token, position) => {
      if (!group || group.part !== token.part) {
        const frame = element("div", { class: "pp-group", role: "group", "aria-label": title(token.part) });
        group = { part: token.part, cells: element("div", { class: "pp-cells" }) };
        frames.push({ frame, cells: group.cells });
        frame.append(element("div", { class: "pp-group-name" }, rich(title(token.part))), group.cells);
        box.append(frame);
      }
      const slots = slotsOf(state, task, token, position);
      const cell = element("div", { class: "pp-token" }), values = element("div", { class: "pp-values" });
      const weight = element("span", { class: "pp-weight" }), score = element("span", { class: "pp-score" });
      slots.forEach((slot) => {
        slot.button = element("button", { type: "button", class: "pp-value" });
        const turn = (by) => { slot.set((slot.get() + by + slot.n) % slot.n); show(); };
        slot.button.addEventListener("click", () => turn(1));
        slot.button.addEventListener("keydown", (event) => {
          const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
          if (!by) return;
          event.preventDefault();
          turn(by);
        });
        values.append(slot.button);
      });
      if (!slots.length) values.append(element("span", { class: "pp-value" }, "–"));
      const place = token.place.length ? `(${token.place.join(", ")})` : task.ns.length === 1 && token.part === "w"
        ? "w_1" : token.part;
      cell.append(element("span", { class: "pp-place" }, rich(place)), values, weight, score);
      group.cells.append(cell);
      cells.push({ cell, slots, weight, score });
    });
    frames.forEach(({ frame, cells: own }) => { frame.style.flexGrow = own.childElementCount; });

    function update(run, t, c) {
      weights = t < 0 ? null : run.attention[t];
      cells.forEach(({ cell, slots, weight, score }, position) => {
        slots.forEach((slot) => {
          slot.button.textContent = String(slot.get());
          slot.button.setAttribute("aria-label",
            `${slot.name} = ${slot.get()}, of 0 to ${slot.n - 1}. Press for the next value`);
        });
        const share = weights ? weights[position] : 0;
        cell.style.setProperty("--share", `${(100 * share).toFixed(2)}%`);
        cell.dataset.read = String(weights !== null && position === largest(weights));
        cell.dataset.faint = String(share < 0.01);
        weight.textContent = weights ? percent(share) : "–";
        score.replaceChildren(weights ? rich(`${number(run.score[t][position] / c, 1)} c`) : "–");
      });
      arcs();
    }

    /** From w to every token, as wide as the weight; only where the whole prompt stands on one line. */
    function arcs() {
      const middles = cells.map(({ cell }) => {
        const at = cell.getBoundingClientRect(), from = box.getBoundingClientRect();
        return { x: at.left - from.left + at.width / 2, y: at.top };
      });
      const line = middles.every((at) => Math.abs(at.y - middles[0].y) < 2);
      box.classList.toggle("pp-one-line", line);
      if (!line) return sky.replaceChildren();
      const width = box.clientWidth, base = 62, end = middles.at(-1).x, high = 58 / (end - middles[0].x);
      sky.setAttribute("viewBox", `0 0 ${width} ${base + 4}`);
      sky.setAttribute("width", width);
      sky.setAttribute("height", base + 4);
      if (sky.childElementCount !== 2 * cells.length) {
        sky.replaceChildren(...cells.flatMap(() => [element("path"), element("circle")]));
      }
      middles.forEach(({ x }, i) => {
        const share = weights ? weights[i] : 0, top = base - (16 + high * (end - x)) * 1.1;
        const bend = x === end ? [end - 15, end + 15] : [end, x];
        const path = sky.children[2 * i], spot = sky.children[2 * i + 1];
        path.setAttribute("d", `M${end} ${base}C${bend[0]} ${top} ${bend[1]} ${top} ${x} ${base}`);
        path.style.strokeWidth = `${(0.75 + 5.25 * share).toFixed(2)}px`;
        path.style.opacity = weights ? (0.18 + 0.82 * Math.sqrt(share)).toFixed(3) : "0";
        Object.entries({ cx: x, cy: base, r: 3.5 }).forEach(([key, value]) => spot.setAttribute(key, value));
        spot.style.opacity = path.style.opacity;
      });
      return null;
    }

    return { parts: [box, ...cells.map(({ cell }) => cell)], box, show: update, arcs };
  }

  /** The values of a token that the reader may change. */
  function slotsOf(state, task, token, position) {
    if (token.part === "z_0") {
      const set = (v) => { state.input.z0 = v; };
      return [{ name: "z_0", n: task.m, get: () => state.input.z0, set }];
    }
    if (token.part === "w") {
      return task.ns.map((n, l) => (
        { name: `w_${l + 1}`, n, get: () => state.input.w[l], set: (v) => { state.input.w[l] = v; } }));
    }
    const l = Number(token.part.slice(2)) - 1;
    const j = position - task.N.slice(l + 1).reduce((sum, N) => sum + N, 0);
    const get = () => state.input.tables[l][j], set = (v) => { state.input.tables[l][j] = v; };
    return [{ name: `${token.part}(${token.place.join(", ")})`, n: task.N[l], get, set }];
  }

  /** Back, forth, and how far we are. */
  function stepView(layers, go) {
    const box = element("div", { class: "pp-steps" });
    const text = element("span", { class: "pp-after" }), bar = element("span", { class: "pp-bar" });
    const ticks = Array.from({ length: layers }, () => element("span"));
    bar.append(...ticks);
    let at = 0;
    const back = button("← Previous layer", () => at > 0 && go(at - 1), "pp-back");
    const next = button("Next layer →", () => at < layers && go(at + 1), "pp-next");
    const middle = element("div", { class: "pp-progress" });
    middle.append(text, bar);
    box.append(back, middle, next);
    const show = (step) => {
      at = step;
      text.textContent = step === 0 ? `before layer 1 of ${layers}` : `after layer ${step} of ${layers}`;
      ticks.forEach((tick, i) => tick.classList.toggle("pp-done", i < step));
      back.setAttribute("aria-disabled", String(step === 0));       // not `disabled`: that would lose the focus
      next.setAttribute("aria-disabled", String(step === layers));
    };
    return { box, show };
  }

  /** What w's query asks for, read off the query vector itself: one chip for the type, one for each place. */
  function asked(data, run, t, c) {
    if (t < 0) return [note("Only the embedding so far: no layer has looked at the prompt.")];
    const names = data.layers[t].W_K.entries.map(([, column]) => coordinate(data, column));
    const query = run.query[t].map((entry) => entry / (c * Math.sqrt(data.d_head)));
    const types = names.filter((one) => one.part === "type").length;
    const wanted = names[largest(query.slice(0, types))].text;
    const chips = [note("w asks for"), chip(`type ${wanted}`)], big = number(Math.max(...query), 1);
    const places = [...new Set(names.slice(types).map((one) => one.part))];
    places.forEach((part) => {
      const bits = query.filter((entry, i) => names[i].part === part);
      const known = bits.every((bit) => Math.abs(bit) > 1e-9);
      const exact = bits.every((bit) => Math.abs(Math.abs(bit) - 1) < 1e-9);
      const has = part === "at i" ? t >= 1 : part === `at w_${t - 1}`;
      if (!known) return has && chips.push(chip(`${part}: open`, "pp-idle"));
      return has && chips.push(chip(`${part} ${exact ? "=" : "≈"} ${fromBits(bits)}`));
    });
    const bits_ = t >= 1 ? ", c more for each bit of its place that agrees, c less for each that differs" : "";
    const rule = element("span", { class: "pp-rule" }, rich(`Score: ${big} c for the type${bits_}.`));
    return [...chips, rule];
  }

  /** The stream of the token w, coordinate by coordinate, at three moments of the layer. */
  function streamView(data) {
    const box = element("div", { class: "pp-stream" });
    const parts = data.parts.filter((part) => /^(type|w_\d+|current|fetched)$/.test(part.name));
    const table = element("table"), head = element("tr"), lines = [];
    const caption = element("caption", {}, "What the token ");
    caption.append(rich("w"), " holds");
    head.append(element("th", { scope: "col", colspan: 2 }, "part"),
      ...MOMENTS.map((moment) => element("th", { scope: "col" }, moment)));
    table.append(caption, element("thead"));
    table.tHead.append(head);
    parts.forEach((part) => {
      const body = element("tbody"), name = element("th", { scope: "rowgroup", rowspan: part.size });
      const meaning = element("span", { class: "pp-meaning" });
      name.append(rich(part.name), meaning);
      for (let i = 0; i < part.size; i++) {
        const line = element("tr"), cells = MOMENTS.map(() => element("td", {}, element("span")));
        if (i === 0) line.append(name);
        line.append(element("th", { scope: "row" }, rich(coordinate(data, part.first + i).text)), ...cells);
        body.append(line);
        lines.push({ column: part.first + i, cells: cells.map((cell) => cell.firstChild) });
      }
      table.append(body);
      part.meaning = meaning;
    });
    const rest = element("p", { class: "pp-note" });
    box.append(table, rest);

    function show(run, t, truth) {
      const moments = t < 0 ? [run.residual[0]] : [run.residual[t], run.middle[t], run.residual[t + 1]];
      lines.forEach(({ column, cells }) => cells.forEach((cell, i) => {
        const x = i < moments.length ? moments[i][column] : null;
        cell.textContent = x === null ? "" : number(x, 3);
        cell.style.setProperty("--size", `${(42 * Math.min(1, Math.abs(x || 0))).toFixed(1)}%`);
        cell.dataset.sign = x > 1e-9 ? "plus" : x < -1e-9 ? "minus" : "zero";
        cell.dataset.changed = String(i > 0 && x !== null && Math.abs(x - moments[i - 1][column]) > 1e-9);
      }));
      const h = moments.at(-1), others = data.parts.filter((part) => !parts.includes(part));
      parts.forEach((part) => part.meaning.replaceChildren(...meaningOf(data, part, h, t, truth)));
      const zero = others.filter((part) => moments.every((x) => columnsOf(part, x).every((v) => v === 0)));
      const D = data.embedding.columns, shown = lines.length;
      rest.replaceChildren(`The other ${D - shown} of ${D} numbers: `,
        ...others.filter((part) => !zero.includes(part)).flatMap((part) =>
          [rich(part.name), ` = ${columnsOf(part, h).map((x) => number(x, 3)).join(", ")}; `]),
        "0 in ", ...zero.flatMap((part, i) => [i ? ", " : "", rich(part.name)]), ".");
    }

    return { box, show };
  }

  function meaningOf(data, part, h, t, truth) {
    const values = columnsOf(part, h);
    if (part.name === "type") return [rich(`= ${coordinate(data, part.first + largest(values)).text}`)];
    if (values.every((x) => Math.abs(x) < 1e-9)) return [part.name === "fetched" && t >= 0 ? "emptied" : "empty"];
    const value = fromBits(values);
    if (part.name !== "current") return [rich(`= ${value}`)];
    return [rich(value === truth[t] ? `= i_${t} = ${value}` : `= ${value} ≠ i_${t}`)];
  }

  /** The definition beside the decoder, step by step, and the logits when there are any. */
  function resultView(data) {
    const box = element("div", { class: "pp-result" }), table = element("table"), head = element("tr");
    const count = data.layers.length;
    table.append(element("caption", {}, "Step by step"), element("thead"), element("tbody"));
    head.append(element("td"));
    for (let t = 0; t < count; t++) head.append(element("th", { scope: "col" }, rich(`i_${t}`)));
    table.tHead.append(head);
    const [says, finds] = ["definition", "decoder"].map((name) => {
      const line = element("tr"), cells = Array.from({ length: count }, () => element("td"));
      line.append(element("th", { scope: "row" }, name), ...cells);
      table.tBodies[0].append(line);
      return cells;
    });
    const logits = element("div", { class: "pp-logits" });
    logits.append(element("p", { class: "pp-logits-name" }, "Logits, read after the last layer"));
    const bars = Array.from({ length: data.W_U.rows }, (_, v) => {
      const line = element("div", { class: "pp-logit" }), bar = element("span", { class: "pp-logit-bar" });
      const value = element("span", { class: "pp-logit-value" });
      bar.append(element("span"));
      line.append(element("span", { class: "pp-logit-name" }, String(v)), bar, value);
      logits.append(line);
      return { line, bar: bar.firstChild, value };
    });
    logits.append(element("p", { class: "pp-note" },
      "One logit for each answer: the bits of current, with the signs of that answer’s bits. Where they are exactly "
      + "±1, a wrong bit costs 2 and the right answer leads by 2."));
    box.append(table, logits);

    function show(run, truth, read, step) {
      truth.forEach((value, t) => {
        says[t].textContent = String(value);
        says[t].classList.toggle("pp-now", t === step - 1);
        finds[t].textContent = t < step ? `${read[t]} ${read[t] === value ? "✓" : "✗"}` : "·";
        finds[t].className = t >= step ? "pp-later" : read[t] === value ? "pp-right" : "pp-wrong";
        finds[t].classList.toggle("pp-now", t === step - 1);
      });
      const done = step === count, top = largest(run.logits), scale = data.parts.find(
        (part) => part.name === "current").size;
      logits.classList.toggle("pp-later", !done);
      bars.forEach(({ line, bar, value }, v) => {
        const x = done ? run.logits[v] : 0, share = 50 * Math.min(1, Math.abs(x) / scale);
        value.textContent = done ? number(x, 2) : "·";
        bar.style.width = `${share}%`;
        bar.style.left = `${x < 0 ? 50 - share : 50}%`;
        line.dataset.top = String(done && v === top);
        line.dataset.right = String(done && v === truth.at(-1));
      });
    }

    return { box, show };
  }

  /** One sentence for the eye and for a screen reader: what this layer did, and whether it is right. */
  function say(state, data, run, truth, read) {
    const { step, input } = state, layers = data.layers.length, t = step - 1, sentence = element("span");
    if (step === 0) {
      sentence.append("The token ", rich("w"), " knows ", rich(input.w.map((v, l) => `w_${l + 1} = ${v}`)
        .join(", ") || "nothing"), " and nothing of the tables. Its part “current” is empty.");
      return sentence;
    }
    const token = promptTokens(data.task, input)[largest(run.attention[t])];
    const source = token.part + (token.place.length ? `(${token.place.join(", ")})` : "");
    sentence.append(`Layer ${step} reads `, rich(source), ` with weight ${percent(Math.max(...run.attention[t]))}: `);
    if (step < layers) {
      const right = read[t] === truth[t];
      sentence.append(rich(`current = i_${t} = ${read[t]}`), right ? " ✓" : `, but the definition has ${truth[t]} ✗`);
      return sentence;
    }
    const answer = largest(run.logits), right = answer === truth.at(-1);
    const called = element("span", { class: "pp-formula" }, rich(definitionText(input, truth)));
    sentence.append("the decoder answers ", element("strong", {}, String(answer)), right ? " ✓. " : " ✗, wrong at ",
      right ? "" : rich(`c = ${state.sharpness.toFixed(2)} c*. `), "The definition: ", called, ".");
    return sentence;
  }

  function definitionText(input, truth) {
    const L = truth.length - 1, place = L >= 2 ? `${input.w[L - 2]}, ${truth[L - 1]}` : truth[L - 1];
    return `i_${L} = z_${L}(${place}) = ${truth[L]}`;
  }

  /** The slider of c, and on how many of all inputs the decoder is wrong there. */
  function sharpnessView(elementId, state, data, show) {
    const { task, sharpness } = data, id = `${elementId}-sharpness`, most = Math.max(2, sharpness.multiple);
    const total = bases(task).reduce((product, base) => product * base, 1);
    const box = element("div", { class: "pp-sharpness" }), line = element("label", { for: id });
    const slider = element("input", { id, type: "range", min: 0.05, max: most, step: 0.05 });
    const value = element("output", { for: id }), name = element("span", {}, "Sharpness ");
    name.append(rich("c"));
    line.append(name, slider, value);
    const mark = element("div", { class: "pp-proved", "aria-hidden": "true" });
    const tick = element("span", {}, rich("c*"));
    tick.append(": proved from here on");
    tick.style.setProperty("--at", String((1 - 0.05) / (most - 0.05)));
    mark.append(tick);
    const count = element("p", { class: "pp-count", role: "status" });
    const text = element("span"), example = button("Show one", () => {
      state.input = inputFromNumber(task, wrong[Math.floor(Math.random() * wrong.length)]);
      state.step = data.layers.length;
      show();
      box.parentElement.firstElementChild.scrollIntoView({ block: "nearest" });
    });
    count.append(text, " ");
    box.append(line, mark, count, example);
    slider.addEventListener("input", () => { state.sharpness = Number(slider.value); show(); });

    let counted = null, waiting = null, wrong = [];
    function update() {
      const c = state.sharpness * sharpness.least, times = `${state.sharpness.toFixed(2)} c*`;
      slider.value = state.sharpness;
      slider.setAttribute("aria-valuetext", `${state.sharpness.toFixed(2)} times the proved sharpness`);
      value.replaceChildren(rich(`= ${times}`), ` (${c.toFixed(2)})`);
      if (total > COUNTABLE) example.hidden = true;
      if (total > COUNTABLE || counted === state.sharpness) return;
      counted = state.sharpness;
      wrong = [];
      example.hidden = true;
      box.dataset.wrong = "";
      text.replaceChildren(`Trying all ${total.toLocaleString("en-US")} inputs …`);
      root.clearTimeout(waiting);
      const found = [], at = state.sharpness;
      const some = (first) => {
        const stop = Math.min(total, first + 512);
        for (let i = first; i < stop; i++) {
          if (isWrong(data, { ...inputFromNumber(task, i), sharpness: at })) found.push(i);
        }
        if (stop < total) waiting = root.setTimeout(some, 0, stop);
        else done(found, times);
      };
      waiting = root.setTimeout(some, 120, 0);
    }

    function done(found, times) {
      wrong = found;
      const all = total.toLocaleString("en-US");
      box.dataset.wrong = String(found.length);
      text.replaceChildren("At ", rich(times), found.length === 0
        ? ` the decoder is right on all ${all} inputs.`
        : ` the decoder is wrong on ${found.length.toLocaleString("en-US")} of all ${all} inputs.`);
      example.hidden = found.length === 0;
    }

    return { box, show: update };
  }

  // ---- small things ----------------------------------------------------------------------------------------

  const columnsOf = (part, h) => h.slice(part.first, part.first + part.size);
  const fromBits = (values) => values.reduce((sum, x) => 2 * sum + (x > 0 ? 1 : 0), 0);
  const readBits = (data, h, name) => fromBits(columnsOf(data.parts.find((part) => part.name === name), h));
  const copy = (input) => ({ z0: input.z0, tables: input.tables.map((table) => table.slice()), w: input.w.slice() });
  const title = (part) => {
    if (part === "z_0" || part === "w") return part === "w" ? "switch" : "start";
    const l = Number(part.slice(2));
    return l === 1 ? "z_1(i_0)" : `${part}(w_${l - 1}, i_${l - 1})`;
  };

  function otherInput(task, input) {
    const draw = () => inputFromDigits(task, bases(task).map((base) => Math.floor(Math.random() * base)));
    let other = draw();
    while (JSON.stringify(other) === JSON.stringify(input)) other = draw();
    return other;
  }

  /** The name of a column of the stream: the part it belongs to, and what to write beside it. */
  function coordinate(data, column) {
    const part = data.parts.find((one) => column >= one.first && column < one.first + one.size);
    const types = [...data.task.N.map((_, l) => `z_${l}`), `z_${data.task.N.length}`, "w"];
    const i = column - part.first;
    return { part: part.name, text: part.name === "type" ? types[i] : part.size > 1 ? `bit ${i}` : "bit" };
  }

  function number(x, digits) {
    const whole = Math.abs(x - Math.round(x)) < 1e-9;
    const text = whole ? String(Math.abs(Math.round(x))) : Math.abs(x).toFixed(digits);
    return x < 0 && Number(text) !== 0 ? `−${text}` : text;
  }

  /** Two digits that count, and never 0 or 100 for what is neither. A narrow space that does not break before the sign. */
  function percent(share) {
    if (share < 5e-5) return "<0.01\u202f%";
    return share > 0.9995 ? ">99.9\u202f%" : `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)}\u202f%`;
  }

  const key = () => {
    const all = root.document.createDocumentFragment();
    all.append("under each value: the weight that ", rich("w"), " gives it, and its score");
    return all;
  };
  const note = (text) => element("span", {}, rich(text));
  const chip = (text, kind = "") => element("span", { class: `pp-chip ${kind}` }, rich(text));

  /** z_1 becomes z with an index, letters of the maths become italic. */
  function rich(text) {
    const all = root.document.createDocumentFragment();
    text.split(/(\b[zwi]_\d+|\b[wic]\b)/).forEach((piece) => {
      if (!/^([zwi]_\d+|[wic])$/.test(piece)) return all.append(piece);
      const [letter, index] = piece.split("_");
      all.append(element("i", {}, letter));
      return index && all.append(element("sub", {}, index));
    });
    return all;
  }

  function button(text, act, kind = "") {
    const made = element("button", { type: "button", class: kind }, text);
    made.addEventListener("click", act);
    return made;
  }

  const SVG_NAMES = new Set(["svg", "path", "circle"]);

  function element(name, attributes = {}, content = null) {
    const made = SVG_NAMES.has(name)
      ? root.document.createElementNS("http://www.w3.org/2000/svg", name)
      : root.document.createElement(name);
    Object.entries(attributes).forEach(([key, value]) => value !== "" && made.setAttribute(key, value));
    if (content !== null) made.append(content);
    return made;
  }

  const known = { runDecoder, mountStepper, definition, inputFromNumber };
  root.ProofAndProbe = Object.assign(root.ProofAndProbe || {}, known);
})(typeof globalThis !== "undefined" ? globalThis : this);
