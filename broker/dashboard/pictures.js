// Drawing: elements, bars, dots. Text goes in as text, always: no name that a client chose is ever read as markup.

import * as words from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

// An HTML element; children are elements and strings.
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A <data>: what is shown, and exactly what it is.
export function tell(element, value, text = words.count(value)) {
  element.value = String(value);
  say(element, text);
}

// Make `parent`'s children those of `items`, in order, keeping every element that is there already, and the focus.
export function keyed(parent, items, keyOf, make, update) {
  const old = (parent.kept ??= new Map());
  const kept = new Map();
  for (const item of items) {
    const key = keyOf(item);
    const element = old.get(key) ?? make(item);
    update(element, item);
    kept.set(key, element);
  }
  const focused = document.activeElement;
  const wanted = [...kept.values()];
  if (wanted.length !== parent.children.length || wanted.some((one, at) => one !== parent.children[at])) {
    parent.replaceChildren(...wanted);
  }
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
  parent.kept = kept;
}

// Parts side by side: [[class, amount], …] of `whole`, as wide as the element will be. What is there is seen: a part has
// at least a hair's width.
export function bar(element, parts, whole, height = 12) {
  element.setAttribute("viewBox", `0 0 1000 ${height}`);
  element.setAttribute("preserveAspectRatio", "none");
  let at = 0;
  const shown = parts.filter(([, amount]) => amount > 0).map(([kind, amount]) => {
    const wide = Math.max(3, (1000 * amount) / Math.max(whole, 1));
    const part = svg("rect", { class: kind, x: at.toFixed(1), y: 0, width: Math.max(1, wide - 2).toFixed(1), height });
    at += wide;
    return part;
  });
  element.replaceChildren(svg("rect", { class: "ground", x: 0, y: 0, width: 1000, height }), ...shown);
}

const GAP = 4;

// The sessions as dots in their tiers' berths. A dot that changes its tier moves there: the style sheet has the transition.
export function ships(element, harbour, sessions, running, chosen, choose) {
  const crowded = sessions.length > 16;
  const [least, more, row] = crowded ? [4, 6, 24] : [6, 9, 34];
  harbour.classList.toggle("crowded", crowded);
  const frame = harbour.getBoundingClientRect();
  element.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
  const room = {};
  for (const berth of harbour.querySelectorAll("[data-berth]")) {
    const box = berth.getBoundingClientRect();
    room[berth.dataset.berth] = {
      x: box.left - frame.left, left: box.left - frame.left, right: box.right - frame.left,
      y: box.top - frame.top + row / 2 + 1, bottom: box.bottom - frame.top,
    };
  }
  const largest = Math.max(1, ...sessions.map((one) => one.tokens));
  const placed = sessions.filter((one) => room[one.home]).map((one) => {
    const radius = least + more * Math.sqrt(one.tokens / largest);
    const berth = room[one.home];
    if (berth.x + 2 * radius + GAP > berth.right && berth.y + row < berth.bottom) { berth.x = berth.left; berth.y += row; }
    const x = berth.x + radius + 1;
    berth.x += 2 * radius + GAP;
    return { ...one, x, y: berth.y, radius, fits: x + radius <= berth.right + 1 };
  });
  keyed(element, placed, (one) => one.id, (one) => {
    const ship = svg("g", {}, svg("circle", { class: "ring" }), svg("circle", { class: "hull" }), svg("title"));
    ship.addEventListener("click", () => choose(one));
    return ship;
  }, (ship, one) => {
    const [ring, hull, title] = ship.children;
    ship.style.transform = `translate(${one.x.toFixed(1)}px, ${one.y.toFixed(1)}px)`;
    const marks = [running.has(one.id) && "running", one.pinned_s !== null && "pinned", one.id === chosen && "chosen", !one.fits && "beyond"];
    ship.setAttribute("class", ["ship", one.home, ...marks.filter(Boolean)].join(" "));
    hull.setAttribute("r", one.radius.toFixed(1));
    ring.setAttribute("r", (one.radius + 2.5).toFixed(1));
    say(title, `${one.session}: ${words.count(one.tokens)} tokens, waits for ${words.waitsFor(one.session_class)}`);
  });
}

const PAD = { left: 52, right: 12, top: 10, bottom: 24 };

// Turns as dots: when they ended across, seconds until their first token upwards, by powers of ten.
export function firstTokens(element, turns, now) {
  const width = Math.max(280, element.parentElement.clientWidth), height = 190;
  element.setAttribute("viewBox", `0 0 ${width} ${height}`);
  element.setAttribute("height", height);
  const times = turns.map((turn) => turn.first_token_s);
  const low = Math.floor(Math.log10(Math.max(1e-3, Math.min(0.1, ...times))));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(1e-3, ...times) * 1.05)));
  const span = Math.max(60, now - Math.min(now, ...turns.map((turn) => turn.ended_at))) * 1.02;
  const x = (at) => PAD.left + (width - PAD.left - PAD.right) * Math.min(1, Math.max(0, 1 - (now - at) / span));
  const y = (s) => height - PAD.bottom - (height - PAD.top - PAD.bottom) * Math.min(1, Math.max(0, (Math.log10(s) - low) / (high - low)));
  const lines = [];
  for (let power = low; power <= high; power += 1) {
    const at = y(10 ** power).toFixed(1);
    lines.push(svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: at, y2: at }));
    lines.push(svg("text", { x: PAD.left - 8, y: Number(at) + 4, "text-anchor": "end" }, power < 0 ? `${10 ** (3 + power)} ms` : `${10 ** power} s`));
  }
  for (const [share, anchor] of [[0, "end"], [0.5, "middle"], [1, "start"]]) {
    const text = share === 0 ? "now" : `${words.long(span * share)} ago`;
    lines.push(svg("text", { x: x(now - span * share).toFixed(1), y: height - 6, "text-anchor": anchor }, text));
  }
  const dots = turns.map((turn) => svg("circle", {
    class: mostlyFrom(turn), cx: x(turn.ended_at).toFixed(1), cy: y(Math.max(1e-4, turn.first_token_s)).toFixed(1), r: 4,
  }, svg("title", {}, `${turn.session ?? turn.request_id}: ${words.seconds(turn.first_token_s)}`)));
  element.replaceChildren(...lines, ...dots.reverse());
}

const mostlyFrom = (turn) => words.SOURCES.reduce((most, source) => (turn.tokens[source] > turn.tokens[most] ? source : most));

// One line for each reason: in words, as a bar, in figures.
export function reasons(list, counts) {
  const all = Object.entries(counts).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
  const whole = all.reduce((sum, [, n]) => sum + n, 0);
  if (!all.length) return;
  keyed(list, all, ([name]) => name, ([name]) => el("li", { "data-reason": name },
    el("span", { class: "reason" }, words.reason(name)), svg("svg", { class: "bar", "aria-hidden": "true", focusable: "false" }),
    el("span", { class: "figures" }, el("data"), " ", el("small"))),
  (item, [name, n]) => {
    const [, picture, figures] = item.children;
    bar(picture, [[words.avoidable(name) ? "computed" : "fresh", n]], all[0][1]);
    tell(figures.children[0], n);
    say(figures.children[1], words.percent(n / whole));
  });
}
