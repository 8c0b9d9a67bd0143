// The page: it asks for the overview once a second, and shows what came.
//
//   look -> learn (what is kept here: turns, moves, rates) -> show (every part, from what is kept) -> wait -> look …
//
// Nothing is asked for while nobody sees the page. A daemon that does not answer is said so, over the last picture of it;
// one that began anew is another daemon, and what was kept of the one before is dropped.

import { Refused, Silent, askForKey, confirmed, demote, forget, overview, pin, unpin } from "./actions.js";
import { $, bar, el, firstTokens, keyed, reasons, say, ships, svg, tell } from "./pictures.js";
import * as words from "./words.js";

const EVERY_MS = 1000;
const RETRY_MS = [1000, 1000, 2000, 4000]; // then every 4 s
const KEPT_TURNS = 512; // as many as the daemon keeps
const KEPT_MOVES = 6;
const SHOWN_TURNS = 40;
const SHOWN_RUNNING = 8;
const FAILED_CHECKS = ["verify_failures_total", "host_failures_total"];

const kept = { now: null, before: null, at: 0, turns: [], homes: new Map(), moves: [], chosen: null };
const idOf = (one) => JSON.stringify([one.tenant, one.session]);

// -- looking ---------------------------------------------------------------------------------------------------------

let timer = null;
let looking = false;
let missed = 0;
let heard = null; // when the daemon last answered

function next(ms) {
  clearTimeout(timer);
  timer = document.hidden ? null : setTimeout(look, ms);
}

async function look() {
  if (looking) return;
  looking = true;
  let wait = EVERY_MS;
  try {
    let now = await overview(kept.now?.turns_ended ?? 0);
    if (kept.now && now.began_at !== kept.now.began_at) {
      Object.assign(kept, { now: null, before: null, turns: [], homes: new Map(), moves: [] });
      now = await overview(0);
    }
    learn(now, performance.now());
    heard = performance.now();
    missed = 0;
    if (document.hidden) state("paused", "paused");
    else state("live", "live");
    show();
  } catch (error) {
    if (error instanceof Refused && error.wantsKey) {
      state("locked", "needs an operator's key");
      await askForKey(error.said);
      wait = 0;
    } else if (error instanceof Refused || error instanceof Silent) {
      state("gone", error instanceof Refused ? error.said : heard === null ? "no answer" : "no answer: what is shown is old");
      wait = RETRY_MS[Math.min(missed, RETRY_MS.length - 1)];
      missed += 1;
    } else {
      throw error;
    }
  } finally {
    looking = false;
    next(wait);
  }
}

function state(name, text) {
  document.body.dataset.state = name;
  say($("state"), text);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
    if (document.body.dataset.state === "live") state("paused", "paused");
  } else {
    look();
  }
});

// -- learning --------------------------------------------------------------------------------------------------------

function learn(now, at) {
  kept.before = kept.now && { look: kept.now, at: kept.at };
  kept.now = now;
  kept.at = at;
  kept.turns = [...now.turns, ...kept.turns].slice(0, KEPT_TURNS);
  const homes = new Map();
  for (const one of now.sessions) {
    one.id = idOf(one);
    one.home = words.homeOf(one);
    const from = kept.homes.get(one.id);
    if (from !== undefined && from !== one.home) kept.moves.unshift({ id: one.id, session: one.session, from, to: one.home, at: now.now });
    homes.set(one.id, one.home);
  }
  kept.homes = homes;
  kept.moves.length = Math.min(kept.moves.length, KEPT_MOVES);
}

function rate(total) {
  const { before, now, at } = kept;
  if (!before || at <= before.at) return null;
  return Math.max(0, (1000 * (total(now.engine) - total(before.look.engine))) / (at - before.at));
}

// -- showing ---------------------------------------------------------------------------------------------------------

function show() {
  const { now } = kept;
  say($("model"), now.model);
  showNow(now);
  showTiers(now);
  showSessions(now);
  showTurns(now);
  showFirst(now);
  showWhy(now.engine);
}

const sum = (counts) => Object.values(counts).reduce((whole, n) => whole + n, 0);

function showNow({ engine, edge, running }) {
  tell($("turns-admitted"), edge.turns_admitted);
  tell($("turns-queued"), edge.turns_queued);
  tell($("loading"), engine.loading);
  tell($("websockets"), edge.websockets);
  tell($("hit-share"), engine.hit_share, words.percent(engine.hit_share));
  tell($("failures"), FAILED_CHECKS.reduce((n, name) => n + sum(engine[name]), 0));
  const rates = {
    sampled: (of) => of.output_tokens_total,
    computed: (of) => of.tokens_total.computed ?? 0,
    restored: (of) => (of.tokens_total.host ?? 0) + (of.tokens_total.disk ?? 0),
  };
  for (const [name, total] of Object.entries(rates)) {
    const a_second = rate(total);
    tell($(`rate-${name}`), a_second ?? "", a_second === null ? "–" : words.count(a_second));
  }
  const begun = running.filter((turn) => turn.session !== null); // of the others no more is known than that they wait
  const shown = begun.slice(0, SHOWN_RUNNING);
  const more = running.length - shown.length;
  if (more > 0) shown.push({ request_id: "more", more });
  keyed($("running"), shown, (turn) => turn.request_id, () => el("li"), (item, turn) => {
    if (turn.more) return say(item, `and ${turn.more} more`);
    if (!item.children.length) item.append(el("bdi"), " ", el("b"), " ", el("span"));
    const [name, stage, time] = item.children;
    say(name, turn.session);
    say(stage, turn.stage);
    say(time, words.seconds(turn.so_far_s));
  });
}

const FLOWS = [["in", "spilled_total"], ["back", "restored_total"], ["out", "evictions_total"]];

function showTiers({ engine, sessions, running }) {
  const tiers = engine.tiers.filter((tier) => words.TIERS.includes(tier.tier));
  keyed($("tiers"), tiers, (tier) => tier.tier, (tier) => el("li", { class: `tier ${tier.tier}` },
    el("div", { class: "head" }, el("h3", {}, words.TIER_NAMES[tier.tier]),
      el("p", {}, el("data", { class: "used" }), " of ", el("data", { class: "capacity" }), el("b"))),
    el("div", { class: "meter", role: "meter", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": `${words.TIER_NAMES[tier.tier]} in use` },
      svg("svg", { class: "bar", "aria-hidden": "true", focusable: "false" })),
    el("div", { class: "berth", "data-berth": tier.tier }),
    el("p", { class: "small" }, el("span", { class: "count" }), el("span", { class: "flows" }))),
  (item, tier) => {
    const share = tier.capacity_bytes ? tier.used_bytes / tier.capacity_bytes : 0;
    tell(item.querySelector(".used"), tier.used_bytes, words.bytes(tier.used_bytes));
    tell(item.querySelector(".capacity"), tier.capacity_bytes, tier.capacity_bytes ? words.bytes(tier.capacity_bytes) : "nothing: off");
    say(item.querySelector("b"), ` · ${words.percent(share)}`);
    const meter = item.querySelector(".meter");
    meter.setAttribute("aria-valuenow", (100 * share).toFixed(1));
    meter.setAttribute("aria-valuetext", `${words.percent(share)}: ${words.CLASSES.map((of) => `${words.plural(tier.classes[of] ?? 0, "block", "blocks")} ${of.replace("_", " ")}`).join(", ")}`);
    const parts = words.CLASSES.map((of) => [of, (tier.classes[of] ?? 0) * tier.block_bytes]);
    const held = parts.reduce((whole, [, size]) => whole + size, 0);
    bar(meter.firstChild, [...parts, ["lent", Math.max(0, tier.used_bytes - held)]], tier.capacity_bytes, 16);
    const here = sessions.filter((one) => one.home === tier.tier).length;
    say(item.querySelector(".count"), words.plural(here, "session", "sessions"));
    const flows = FLOWS.map(([name, total]) => [name, rate((of) => of[total][tier.tier] ?? 0)]).filter(([, n]) => n);
    say(item.querySelector(".flows"), flows.map(([name, n]) => `${name} ${words.count(n)} blocks/s`).join(" · "));
    if (tier.tier === "disk" && engine.disk.state === "degraded") {
      say(item.querySelector(".flows"), `refuses writes: ${engine.disk.reason}`);
    }
  });
  ships($("ships"), $("harbour"), sessions, new Set(running.map(idOf)), kept.chosen && kept.chosen.id, choose);
  if (kept.moves.length) {
    keyed($("moves"), kept.moves, (move) => `${move.at} ${move.id}`, (move) => el("li", {},
      el("bdi", {}, move.session), ` from ${place(move.from)} to ${place(move.to)}, `, el("time")),
    (item, move) => say(item.querySelector("time"), `${words.long(kept.now.now - move.at)} ago`));
  }
}

const place = (tier) => tier || "nowhere";

function showSessions({ sessions, sessions_known }) {
  say($("sessions-shown"), sessions_known > sessions.length ? `the last ${sessions.length} of ${words.count(sessions_known)}` : `${sessions_known}`);
  keyed($("session-rows"), sessions, (one) => one.id, (one) => {
    const name = el("button", { type: "button" }, el("bdi", {}, one.session));
    name.addEventListener("click", () => choose(one));
    return el("tr", {}, el("th", { scope: "row" }, name), el("td"),
      el("td", { class: "where" }, svg("svg", { class: "bar", "aria-hidden": "true", focusable: "false" }), el("span", { class: "small" })),
      el("td", { class: "number" }, el("data")), el("td", { class: "number" }));
  }, (row, one) => {
    const [name, waits, where, tokens, idle] = row.children;
    const chosen = kept.chosen?.id === one.id;
    name.firstChild.setAttribute("aria-pressed", String(chosen));
    row.classList.toggle("chosen", chosen);
    say(waits, one.pinned_s === null ? words.waitsFor(one.session_class) : `pinned, ${words.long(one.pinned_s)} left`);
    const parts = words.foundFirst(one.tokens, one.tokens_on);
    bar(where.firstChild, parts.map(([tier, n]) => [tier || "nowhere", n]), parts.reduce((all, [, n]) => all + n, 0));
    say(where.lastChild, parts.filter(([, n]) => n).map(([tier, n]) => `${tier || "to be computed"} ${words.count(n)}`).join(", "));
    tell(tokens.firstChild, one.tokens);
    say(idle, words.long(one.idle_s));
  });
}

function showTurns({ now }) {
  const chosen = kept.chosen;
  const mine = chosen ? kept.turns.filter((turn) => idOf(turn) === chosen.id) : kept.turns;
  $("session").hidden = $("all-turns").hidden = !chosen;
  if (chosen) {
    const known = kept.now.sessions.find((one) => one.id === chosen.id);
    say($("session-about"), known
      ? `${words.count(known.tokens)} tokens, mostly in ${known.home || "no tier"}; waits for ${words.waitsFor(known.session_class)}.`
      : "The daemon does not remember this session any more.");
    $("unpin").hidden = !known || known.pinned_s === null;
    for (const control of $("actions").querySelectorAll("button, select")) control.disabled = !known;
  }
  const shown = mine.slice(0, SHOWN_TURNS);
  const largest = Math.max(1, ...shown.map((turn) => turn.prompt_tokens));
  if (!shown.length) {
    $("turns").kept = new Map();
    return $("turns").replaceChildren(el("li", { class: "nothing" }, chosen ? "None that this page knows." : "None yet."));
  }
  keyed($("turns"), shown, (turn) => turn.request_id, (turn) => {
    const [head, why] = [el("p", { class: "head" }), words.whyMissed(turn)];
    const item = el("li", { "data-turn": turn.request_id }, head, svg("svg", { class: "bar", "aria-hidden": "true", focusable: "false" }),
      el("p", { class: "small" }, figures(turn)));
    if (why) item.append(el("p", { class: lost(turn) ? "why lost" : "why" }, why));
    const status = BAD.has(turn.status) ? "status bad" : "status";
    head.append(el("bdi", {}, turn.session ?? turn.request_id), el("span", { class: status }, statusOf(turn)), el("time"));
    return item;
  }, (item, turn) => {
    bar(item.children[1], words.SOURCES.map((source) => [source, turn.tokens[source]]), largest);
    item.firstChild.firstChild.hidden = Boolean(chosen);
    say(item.querySelector("time"), `${words.long(Math.max(0, now - turn.ended_at))} ago`);
  });
}

const BAD = new Set(["failed", "refused", "abandoned"]);
const lost = (turn) => turn.diverged || Object.entries(turn.recomputed).some(([name, n]) => n && words.avoidable(name));
const statusOf = (turn) => (turn.status === "completed" ? "" : turn.reason ?? turn.status);

function figures(turn) {
  const sources = words.SOURCES.filter((source) => turn.tokens[source]);
  const parts = [sources.map((source) => `${source} ${words.count(turn.tokens[source])}`).join(" + ") || "no prompt"];
  if (turn.first_token_s !== null) parts.push(`first token ${words.seconds(turn.first_token_s)}`);
  parts.push(`all ${words.seconds(turn.total_s)}${words.slowest(turn) ? ` (${words.slowest(turn)})` : ""}`);
  return parts.join(" · ");
}

function showFirst({ now }) {
  const turns = kept.turns.filter((turn) => turn.first_token_s !== null);
  if (!turns.length) return;
  const sorted = turns.map((turn) => turn.first_token_s).sort((a, b) => a - b);
  const at = (share) => words.seconds(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
  say($("first-said"), `Of the last ${words.plural(turns.length, "turn", "turns")}: half within ${at(0.5)}, 95 % within ${at(0.95)}.`);
  firstTokens($("first"), turns, now);
}

function showWhy(engine) {
  for (const source of words.SOURCES) tell($(`tokens-${source}`), engine.tokens_total[source] ?? 0);
  reasons($("why"), engine.recomputed_total);
}

// -- one session -----------------------------------------------------------------------------------------------------

function choose(one) {
  kept.chosen = { id: one.id, session: one.session, tenant: one.tenant };
  $("h-turns").replaceChildren("Turns of ", el("bdi", {}, one.session));
  outcome("");
  show();
  $("h-turns").focus({ preventScroll: true });
  $("turns-section").scrollIntoView({ block: "nearest" });
}

function chooseNone() {
  const rows = [...$("session-rows").children];
  const row = rows.find((one) => one.classList.contains("chosen"));
  kept.chosen = null;
  $("h-turns").replaceChildren("Turns");
  outcome("");
  show();
  (row ? row.querySelector("button") : $("h-turns")).focus();
}

$("all-turns").addEventListener("click", chooseNone);
$("turns-section").addEventListener("keydown", (event) => { if (event.key === "Escape" && kept.chosen) chooseNone(); });

function outcome(text) {
  say($("trouble"), "");
  say($("outcome"), text);
}

// Ask the person, do it, say what came of it, and look at once.
async function act(order, question, said) {
  const session = kept.chosen;
  if (!(await confirmed(...question(session)))) return;
  outcome("under way …");
  try {
    outcome(said(await order(session)));
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Silent)) throw error;
    outcome("");
    say($("trouble"), error instanceof Refused ? error.said : "no answer: whether it was done is not known");
  }
  look();
}

$("pin").addEventListener("click", () => {
  const ttl = $("pin-for").value;
  act((session) => pin(session, ttl),
    ({ session }) => ["Pin this session?", `${session}: its KV stays in memory for ${ttl}, whatever else needs the room.`, "Pin"],
    (done) => `Pinned for ${words.long(done.ttl_s)}: ${words.count(done.tokens)} tokens, ${words.bytes(done.held_bytes)}.`);
});
$("unpin").addEventListener("click", () => act(unpin,
  ({ session }) => ["End the pin?", `${session}: it may leave memory like any other then.`, "End pin"],
  () => "The pin has ended."));
for (const tier of ["host", "disk"]) {
  $(`demote-${tier}`).addEventListener("click", () => act((session) => demote(session, tier),
    ({ session }) => [`Demote to ${tier}?`, `${session}: its KV leaves what is faster. Its next turn restores it.`, "Demote"],
    (done) => `${words.plural(done.moved_blocks, "block", "blocks")} moved to ${tier}.`));
}
$("delete").addEventListener("click", () => act(forget,
  ({ session }) => ["Delete this session?", `${session}: all its responses and their KV, from every tier. There is no way back.`, "Delete"],
  (done) => `Deleted: ${words.plural(done.deleted_responses, "response", "responses")}.`));

window.addEventListener("resize", () => { if (kept.now) show(); });
look();
