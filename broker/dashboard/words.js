// Numbers and names as people read them. Pure: values in, text out; nothing here touches the page.

export const TIERS = ["device", "host", "disk"];
export const SOURCES = ["computed", ...TIERS];
export const CLASSES = ["pinned", "burst", "tool_wait", "human_wait", "closed"]; // what stays longest first

export const TIER_NAMES = { device: "Device memory", host: "Host memory", disk: "Disk" };
const CLASS_WORDS = {
  pinned: "nothing: pinned", burst: "the next step", tool_wait: "a tool", human_wait: "a person", closed: "nobody",
};
const LOSSES = { capacity: "it was full", quota: "its tenant had its share", superseded: "a later turn replaced it", expired: "its protection ended" };
const REASONS = {
  new: "never seen before",
  logits: "last token of a prompt: always computed",
  changed: "differs from the turn before",
  deleted: "deleted",
  verify_failed: "failed its check",
  io_failed: "could not be read",
  slow: "restoring took too long",
  loss: "computing was faster than restoring",
};
const FRESH = new Set(["new", "logits", "changed"]); // what no cache could have had

export const count = (n) => Math.round(n).toLocaleString("en-US");
export const percent = (share) => `${(100 * share).toFixed(share >= 0.9995 || share === 0 ? 0 : 1)} %`;

export function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < 4) { n /= 1024; unit += 1; }
  return `${unit === 0 || n >= 99.95 ? Math.round(n) : n.toFixed(1)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function seconds(s) {
  if (s < 0.0005) return "0 ms";
  if (s < 0.00995) return `${(1000 * s).toFixed(1)} ms`;
  if (s < 0.9995) return `${Math.round(1000 * s)} ms`;
  if (s < 99.5) return `${s < 9.995 ? s.toFixed(2) : s.toFixed(1)} s`;
  return long(s);
}

// Where a part of a second says nothing.
export function long(s) {
  if (s < 99.5) return `${Math.round(s)} s`;
  if (s < 5970) return `${Math.round(s / 60)} min`;
  return s < 172_000 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86_400)} d`;
}

export const waitsFor = (of) => (of === null ? "nobody: not kept" : CLASS_WORDS[of] ?? of);

export function reason(name) {
  const evicted = /^evicted_(\w+)_(\w+)$/.exec(name);
  return evicted ? `left ${evicted[1]}: ${LOSSES[evicted[2]] ?? evicted[2]}` : REASONS[name] ?? name;
}

export const avoidable = (name) => !FRESH.has(name);

// Where a session's tokens are found first: [[tier, tokens], …], and what is nowhere as ["", tokens]. Without the last
// one: it was sampled and has not been fed yet, so it is in no tier, and nothing is missing.
export function foundFirst(tokens, on) {
  let left = Math.max(0, tokens - 1);
  const parts = TIERS.map((tier) => {
    const here = Math.min(left, on[tier] ?? 0);
    left -= here;
    return [tier, here];
  });
  return [...parts, ["", left]];
}

// The tier in which most of them are found; "" if most are nowhere.
export function homeOf(session) {
  return foundFirst(session.tokens, session.tokens_on).reduce((best, part) => (part[1] > best[1] ? part : best))[0];
}

// Why a turn's prompt was not found whole, in a sentence; "" where nothing was missing.
export function whyMissed(turn) {
  const said = [];
  if (turn.diverged) said.push(`differs from the turn before at token ${count(turn.diverged.at)}, in ${turn.diverged.part}`);
  const missed = Object.entries(turn.recomputed).filter(([name, n]) => n && name !== "logits");
  for (const [name, n] of missed.sort((a, b) => b[1] - a[1])) {
    if (name !== "changed" || !turn.diverged) said.push(`${count(n)} ${reason(name)}`);
  }
  return said.join("; ");
}

// The stages that a turn's time went into, the longest first; what is under a twentieth of it is left out.
export function slowest(turn) {
  const stages = Object.entries(turn.stages_s).filter(([, s]) => s >= 0.05 * turn.total_s && s >= 0.0005);
  return stages.sort((a, b) => b[1] - a[1]).map(([name, s]) => `${name} ${seconds(s)}`).join(", ");
}

export const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
