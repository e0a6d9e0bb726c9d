"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Light and dark: the system's choice until the button is pressed.
  const theme = byId("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const named = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();

  // One tooltip; names come from people's code, so it only ever holds text.
  const tip = byId("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 14 - box.width : x + 16;
    const top = y + 18 + box.height > innerHeight ? y - 12 - box.height : y + 18;
    tip.style.left = `${Math.max(6, Math.min(left, innerWidth - box.width - 6))}px`;
    tip.style.top = `${Math.max(6, top)}px`;
  };
  const hide = () => { tip.hidden = true; };
  const follow = (event) => {
    const target = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (target) show(target.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest || !event.target.closest("#heat-cells, #pair-cells")) hide();
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerdown", follow);
  document.addEventListener("scroll", hide, { passive: true, capture: true });
  root.addEventListener("pointerleave", hide);

  // Print everything, also what is folded.
  addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details")) d.open = true;
  });

  // The heatmaps.
  const source = byId("heat-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const unpack = (part) => {
    if (!part) return null;
    if (part.same !== undefined) return { at: () => part.same };
    const text = atob(part.base64);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const read = { 1: (i) => bytes[i], 2: (i) => view.getUint16(2 * i, true), 4: (i) => view.getUint32(4 * i, true) };
    return { at: read[part.bytes] };
  };
  const below = unpack(data.below), measured = unpack(data.measured);
  const pairBelow = unpack(data.pairBelow), pairMeasured = unpack(data.pairMeasured);
  const L = data.layers.length, W = data.borders.length - 1, T = data.tasks.length, P = (T * (T - 1)) / 2;
  const inTime = data.pairWindows === W;
  const pairs = [];
  for (let i = 0; i < T; i++) for (let j = i + 1; j < T; j++) pairs.push([i, j]);
  const pairAt = (i, j) => (i > j ? pairAt(j, i) : (i * (2 * T - i - 1)) / 2 + j - i - 1);
  const chosen = { layer: null, time: null, pair: null };

  // Conflicts and pairs that there were; null stands for all of them.
  const count = (layer, time, pair) => {
    let found = 0, there = 0;
    const times = pair === null ? W : data.pairWindows;
    const [l0, l1] = layer === null ? [0, L] : [layer, layer + 1];
    const [t0, t1] = time === null || (pair !== null && !inTime) ? [0, times] : [time, time + 1];
    for (let t = t0; t < t1; t++) {
      for (let l = l0; l < l1; l++) {
        if (pair === null) { found += below.at(t * L + l); there += measured.at(t * L + l); }
        else { found += pairBelow.at((t * L + l) * P + pair); there += pairMeasured.at((t * L + l) * P + pair); }
      }
    }
    return [found, there];
  };
  const percent = (found, there) => (there ? `${((100 * found) / there).toFixed(2)}\u00a0%` : "n/a");
  const number = (n) => n.toLocaleString("en-US");
  const steps = (t) => {
    const from = data.borders[t] * data.every + 1, to = data.borders[t + 1] * data.every;
    return `steps ${number(from)} to ${number(to)}`;
  };
  const pairName = (p) => `${data.tasks[pairs[p][0]]} × ${data.tasks[pairs[p][1]]}`;
  const nice = (top) => {
    if (!(top > 0)) return 1;
    const power = 10 ** Math.floor(Math.log10(top / 4));
    const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= (top / 4) * 0.999);
    return Math.min(1, Math.ceil(top / size - 1e-9) * size);
  };
  const shade = (found, there, top) =>
    there ? `q${Math.min(data.shades - 1, Math.floor((found / there / top) * data.shades))}` : "none";
  const paint = (svg, legend, values, cellsPerValue) => {
    const rates = values.filter((v) => v[1]).map((v) => v[0] / v[1]);
    const top = nice(rates.reduce((a, b) => Math.max(a, b), 0));
    const cells = svg.querySelectorAll("rect:not(.chosen)");
    values.forEach((v, i) => {
      for (let k = 0; k < cellsPerValue; k++) cells[i * cellsPerValue + k].setAttribute("class", shade(v[0], v[1], top));
    });
    legend.querySelector(".top").textContent = `${+(100 * top).toPrecision(4)}\u00a0%`;
  };
  const mark = (svg, x, y, width, height) => {
    const box = svg.querySelector(".chosen");
    for (const [name, value] of Object.entries({ x, y, width, height })) box.setAttribute(name, value);
  };

  const map = byId("heat-cells"), square = byId("pair-cells");
  const names = [...byId("heat-names").children];
  const where = () => {
    const layer = chosen.layer === null ? "all layers" : data.layers[chosen.layer];
    return `${layer}, ${chosen.time === null ? "all steps" : steps(chosen.time)}`;
  };
  const say = () => {
    const [found, there] = count(chosen.layer, chosen.time, chosen.pair);
    const who = chosen.pair === null ? (P > 1 ? "all pairs" : pairName(0)) : pairName(chosen.pair);
    const time = chosen.pair !== null && !inTime && chosen.time !== null ? ", all steps (pairs are not kept per window)" : "";
    const text = `${where()}${time}, ${who}: ${number(found)} conflicts in ${number(there)} pairs, ${percent(found, there)}.`;
    byId("heat-said").textContent = text[0].toUpperCase() + text.slice(1);
  };
  const paintMap = () => {
    const pair = inTime ? chosen.pair : null;
    const values = [];
    for (let l = 0; l < L; l++) for (let t = 0; t < W; t++) values.push(count(l, t, pair));
    paint(map, byId("heat-legend"), values, 1);
    byId("heat-which").textContent = pair === null ? "all pairs of tasks" : pairName(pair);
  };
  const paintSquare = () => {
    if (!square) return;
    paint(square, byId("pair-legend"), pairs.map((_, p) => count(chosen.layer, chosen.time, p)), 2);
    byId("pair-which").textContent = inTime || chosen.time === null ? where() : `${where().split(", ")[0]}, all steps`;
  };
  const refresh = (mapToo) => {
    const x = chosen.time === null ? 0 : chosen.time, y = chosen.layer === null ? 0 : chosen.layer;
    const none = chosen.layer === null && chosen.time === null;
    mark(map, none ? -9 : x, none ? -9 : y, chosen.time === null ? W : 1, chosen.layer === null ? L : 1);
    names.forEach((n, i) => n.classList.toggle("on", i === chosen.layer));
    if (square) {
      const [i, j] = chosen.pair === null ? [-9, -9] : pairs[chosen.pair];
      mark(square, j, i, 1, 1);
    }
    if (mapToo) paintMap();
    paintSquare();
    say();
  };
  const choose = (layer, time) => {
    const same = chosen.layer === layer && chosen.time === time;
    chosen.layer = same ? null : layer;
    chosen.time = same ? null : time;
    refresh(false);
  };
  const choosePair = (pair) => {
    chosen.pair = chosen.pair === pair ? null : pair;
    refresh(true);
  };
  const cell = (svg, event, columns, rows) => {
    const box = svg.getBoundingClientRect();
    const within = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
    return [within((event.clientX - box.left) / box.width, columns), within((event.clientY - box.top) / box.height, rows)];
  };
  const mapTip = (event) => {
    const [t, l] = cell(map, event, W, L);
    const pair = inTime ? chosen.pair : null;
    const [found, there] = count(l, t, pair);
    const who = pair === null ? (P > 1 ? "all pairs" : pairName(0)) : pairName(pair);
    show(`${data.layers[l]}\n${steps(t)}, ${who}\n${number(found)} conflicts in ${number(there)} pairs: ${percent(found, there)}`, event.clientX, event.clientY);
  };
  map.addEventListener("pointermove", mapTip);
  map.addEventListener("pointerleave", hide);
  map.addEventListener("click", (event) => { const [t, l] = cell(map, event, W, L); choose(l, t); mapTip(event); });
  map.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") { chosen.layer = chosen.time = null; refresh(false); }
    if (!move) return;
    event.preventDefault();
    const within = (v, n) => Math.max(0, Math.min(n - 1, v));
    chosen.layer = chosen.layer === null ? 0 : within(chosen.layer + move[0], L);
    chosen.time = chosen.time === null ? 0 : within(chosen.time + move[1], W);
    refresh(false);
  });
  names.forEach((n, i) => n.addEventListener("click", () => choose(i, null)));
  byId("heat-all").addEventListener("click", () => {
    const mapToo = chosen.pair !== null;
    chosen.layer = chosen.time = chosen.pair = null;
    refresh(mapToo);
  });
  if (!square) return;
  const squareTip = (event) => {
    const [j, i] = cell(square, event, T, T);
    if (i === j) { hide(); return; }
    const pair = pairAt(i, j);
    const [found, there] = count(chosen.layer, chosen.time, pair);
    show(`${pairName(pair)}\n${byId("pair-which").textContent}\n${number(found)} conflicts in ${number(there)} pairs: ${percent(found, there)}`, event.clientX, event.clientY);
  };
  square.addEventListener("pointermove", squareTip);
  square.addEventListener("pointerleave", hide);
  square.addEventListener("click", (event) => {
    const [j, i] = cell(square, event, T, T);
    if (i !== j) choosePair(pairAt(i, j));
    squareTip(event);
  });
  square.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    chosen.pair = chosen.pair === null ? 0 : (chosen.pair + move + P) % P;
    refresh(true);
  });
})();
