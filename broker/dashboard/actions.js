// What is asked of the daemon and what it is told to do; the key that this takes, and the question before what cannot be undone.

import { $, say } from "./pictures.js";

const KEY = "homeport key"; // in this tab's sessionStorage, and nowhere else
const PATIENCE_MS = 8000;

// The daemon said no: `code` and `message` are its words.
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get said() { return `${this.code}: ${this.message}`; }

  get wantsKey() { return this.status === 401 || this.code === "operator_only"; }
}

// The daemon said nothing, or nothing that is an answer.
export class Silent extends Error {}

// The JSON of a path beside this page. Throws Refused, Silent.
export async function ask(method, path, body) {
  const key = sessionStorage.getItem(KEY);
  let answer, text;
  try {
    answer = await fetch(path, {
      method,
      headers: { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) },
      body: body && JSON.stringify(body),
      cache: "no-store", credentials: "omit", redirect: "error",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    text = await answer.text();
  } catch (error) {
    throw new Silent(String(error));
  }
  let said;
  try {
    said = JSON.parse(text);
  } catch {
    throw answer.ok ? new Silent("that is no answer of Homeport's") : new Refused(answer.status, `HTTP ${answer.status}`, text.slice(0, 200));
  }
  if (answer.ok) return said;
  throw new Refused(answer.status, said.error?.code ?? `HTTP ${answer.status}`, said.error?.message ?? "no reason given");
}

// Ask for an operator's key, once however often it is called; resolves when one was given. `why` is shown.
let asking = null;
export function askForKey(why) {
  const door = $("door");
  const had = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  asking ??= new Promise((given) => {
    say($("door-said"), had ? why : "");
    $("key").value = "";
    door.showModal();
    door.oncancel = (event) => event.preventDefault(); // there is nothing behind it
    door.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("key").value = "";
      door.close();
      asking = null;
      given();
    };
  });
  return asking;
}

// Whether the person wants it. Escape and Cancel are no.
export function confirmed(title, what, doIt) {
  const dialog = $("confirm");
  say($("h-confirm"), title);
  say($("confirm-said"), what);
  say($("yes"), doIt);
  dialog.showModal();
  $("no").focus();
  return new Promise((decided) => {
    let wanted = false;
    $("yes").onclick = () => { wanted = true; dialog.close(); };
    $("no").onclick = () => dialog.close();
    dialog.onclose = () => decided(wanted);
  });
}

const named = (session) => encodeURIComponent(session.session);
const whose = (session) => `tenant=${encodeURIComponent(session.tenant)}`;
const pointed = (session) => ({ session: session.session, tenant: session.tenant });

export const overview = (seen) => ask("GET", `admin/overview?turns_after=${seen}`);
export const pin = (session, ttl) => ask("POST", "admin/pins", { ...pointed(session), ttl });
export const unpin = (session) => ask("DELETE", `admin/pins/${named(session)}?${whose(session)}`);
export const demote = (session, tier) => ask("POST", "admin/demote", { ...pointed(session), tier });
export const forget = (session) => ask("DELETE", `admin/sessions/${named(session)}?${whose(session)}`);
