"""The dashboard in a real browser over a real broker, engine thread, tiers and store; the model alone is a stub."""

import pytest
from playwright.sync_api import expect

from tests.browser.harbour import Harbour

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e&amp;'\""


def row(page, name):
    return page.locator("#session-rows tr").filter(has=page.get_by_text(name, exact=True))


def choose(page, name):
    row(page, name).get_by_role("button").click()
    expect(page.locator("#h-turns")).to_have_text(f"Turns of {name}")


def order(page, button, answer):
    """Press a button, and answer the question that it asks."""
    page.get_by_role("group", name="What to do with this session").get_by_role(
        "button", name=button, exact=True
    ).click()
    page.locator("#confirm").get_by_role("button", name=answer, exact=True).click()


def value(page, selector):
    return float(page.locator(selector).get_attribute("value"))


def settled(page):
    """The page has seen what is there now: two more looks have been answered."""
    for _ in range(2):
        with page.expect_response(lambda answer: "/admin/overview" in answer.url):
            pass


def test_every_live_number_is_the_one_in_the_metrics(watch, harbour):
    page = watch(harbour.url).page
    page.locator(".tier").first.wait_for()
    settled(page)
    metrics = harbour.metrics()
    shown = {
        "#turns-admitted": metrics["homeport_turns_admitted"],
        "#turns-queued": metrics["homeport_turns_queued"],
        "#loading": metrics["homeport_loading"],
        "#websockets": metrics["homeport_websockets"],
        "#hit-share": metrics["homeport_hit_share"],
        "#failures": sum(
            number
            for name, number in metrics.items()
            if name.startswith("homeport_verify_failures_total")
        ),
        **{
            f"#tokens-{source}": metrics[f'homeport_tokens_total{{source="{source}"}}']
            for source in ("computed", "device", "host", "disk")
        },
        **{
            f".tier.{tier} .{shown}": metrics[f'homeport_tier_{shown}_bytes{{tier="{tier}"}}']
            for tier in ("device", "host", "disk")
            for shown in ("used", "capacity")
        },
    }
    assert {selector: value(page, selector) for selector in shown} == shown
    reasons = {
        name.partition('reason="')[2][:-2]: number
        for name, number in metrics.items()
        if name.startswith("homeport_recomputed_tokens_total") and number
    }
    items = page.locator("#why li").all()
    assert reasons == {
        one.get_attribute("data-reason"): float(one.locator("data").get_attribute("value"))
        for one in items
    }
    ended = sum(n for name, n in metrics.items() if name.startswith("homeport_turns_ended_total"))
    assert page.locator("#first circle").count() == min(ended, 512)


def test_each_turn_has_a_bar_of_its_sources_and_says_why_its_prompt_was_not_found(watch, harbour):
    page = watch(harbour.url).page
    choose(page, "agent-2")
    turns = [t for t in harbour.ask("GET", "/admin/turns")["turns"] if t["session"] == "agent-2"]
    items = page.locator("#turns li[data-turn]")
    expect(items).to_have_count(len(turns))
    largest = max(turn["prompt_tokens"] for turn in turns)
    for turn in turns:
        item = page.locator(f'#turns li[data-turn="{turn["request_id"]}"]')
        for source in ("computed", "device", "host", "disk"):
            part = item.locator(f"rect.{source}")
            tokens = turn["tokens"][source]
            assert part.count() == (1 if tokens else 0)
            if tokens:
                width = float(part.get_attribute("width"))
                assert width == pytest.approx(1000 * tokens / largest, abs=3)
                assert f"{source} {tokens:,}" in item.inner_text()
    changed = turns[0]
    at, part = changed["diverged"]["at"], changed["diverged"]["part"]
    assert part == "instructions"
    expect(items.first.locator(".why")).to_contain_text(
        f"differs from the turn before at token {at}, in instructions"
    )


def test_a_session_that_moves_is_seen_to_move(watch, harbour):
    harbour.turn("mover", 2)
    page = watch(harbour.url).page
    ship = page.locator(".ship").filter(has=page.locator("title", has_text="mover:"))
    expect(ship).to_have_class("ship device")
    before = ship.bounding_box()
    harbour.ask("POST", "/admin/demote", {"tier": "disk", "session": "mover"})
    expect(ship).to_have_class("ship disk")
    expect(page.locator("#moves li").first).to_contain_text("mover from device to disk")
    expect(row(page, "mover")).to_contain_text("disk")
    disk = page.locator(".tier.disk").bounding_box()
    after = ship.bounding_box()
    assert before["y"] < after["y"]
    assert disk["y"] <= after["y"] <= disk["y"] + disk["height"], "it lies in its tier"


def test_pin_demote_and_delete_ask_then_do_then_say_what_happened(watch, harbour):
    harbour.turn("errand", 2)
    page = watch(harbour.url).page
    choose(page, "errand")

    order(page, "Pin", "Cancel")
    settled(page)
    assert harbour.metrics()["homeport_pins"] == 1, "agent-5's alone"
    order(page, "Pin", "Pin")
    expect(page.locator("#outcome")).to_contain_text("Pinned for 60 min:")
    expect(row(page, "errand")).to_contain_text("pinned")
    assert {one["session"] for one in harbour.ask("GET", "/admin/pins")["pins"]} == {
        "agent-5",
        "errand",
    }
    order(page, "End pin", "End pin")
    expect(page.locator("#outcome")).to_have_text("The pin has ended.")
    expect(page.locator("#unpin")).to_be_hidden()

    order(page, "Demote to disk", "Demote")
    expect(page.locator("#outcome")).to_contain_text("moved to disk.")
    expect(page.locator("#session-about")).to_contain_text("mostly in disk")

    order(page, "Delete …", "Delete")
    expect(page.locator("#outcome")).to_have_text("Deleted: 1 response.")
    expect(row(page, "errand")).to_have_count(0)
    expect(page.locator("#session-about")).to_contain_text("does not remember this session")
    expect(page.locator("#delete")).to_be_disabled()


def test_an_order_that_is_refused_shows_the_code_and_the_reason(watch, harbour):
    harbour.turn("huge", 20)
    watched = watch(harbour.url, words_expected=True)  # the browser writes every 4xx on its console
    page = watched.page
    choose(page, "huge")
    order(page, "Pin", "Pin")
    expect(page.locator("#trouble")).to_contain_text("pin_quota_exceeded: Pins may cover at most")
    assert page.get_by_role("alert").filter(has_text="pin_quota_exceeded").count() == 1
    harbour.ask("DELETE", "/admin/sessions/huge")
    order(page, "Delete …", "Delete")
    expect(page.locator("#trouble")).to_contain_text("session_not_found: No session 'huge'.")
    expect(page.locator("#outcome")).to_be_hidden()


def test_the_keyboard_alone_reaches_and_does_everything(watch, harbour):
    harbour.turn("keys", 2)
    page = watch(harbour.url).page
    row(page, "keys").wait_for()

    def reached(selector, presses=120):
        for _ in range(presses):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"the Tab key does not reach {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    reached("#session-rows button")
    while page.evaluate("document.activeElement.textContent") != "keys":
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    harbour.turn("another")  # its row comes first now, and the focus stays where it was
    expect(page.locator("#session-rows tr").first).to_contain_text("another")
    assert page.evaluate("document.activeElement.textContent") == "keys"
    page.keyboard.press("Space")
    expect(page.locator("#h-turns")).to_have_text("Turns of keys")
    expect(page.locator("#h-turns")).to_be_focused()

    settled(page)
    expect(page.locator("#h-turns")).to_be_focused()  # a look takes nobody's focus away
    reached("#demote-host")
    page.keyboard.press("Enter")
    expect(page.locator("#no")).to_be_focused()  # what does nothing comes first
    page.keyboard.press("Escape")
    expect(page.locator("#confirm")).to_be_hidden()
    expect(page.locator("#demote-host")).to_be_focused()
    page.keyboard.press("Space")
    reached("#yes", 3)
    page.keyboard.press("Enter")
    expect(page.locator("#outcome")).to_contain_text("moved to host.")
    page.locator("#demote-host").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#h-turns")).to_have_text("Turns")
    expect(row(page, "keys").get_by_role("button")).to_be_focused()


def test_the_accessibility_tree_has_names_roles_and_states(watch, harbour):
    page = watch(harbour.url).page
    row(page, "agent-1").wait_for()
    choose(page, "agent-1")
    for heading in (
        "Tiers", "Sessions", "Turns of agent-1", "Time to first token", "Why prompt tokens were computed",
    ):  # fmt: skip
        assert page.get_by_role("heading", name=heading).count() == 1, heading
    for name in ("Device memory", "Host memory", "Disk"):
        meter = page.get_by_role("meter", name=f"{name} in use")
        assert 0 <= float(meter.get_attribute("aria-valuenow")) <= 100
        assert "blocks" in meter.get_attribute("aria-valuetext")
    assert page.get_by_role("status").filter(has_text="live").count() == 1
    assert page.get_by_role("row").count() > 5
    assert page.get_by_role("button", name="agent-1", pressed=True).count() == 1
    assert page.get_by_role("combobox", name="Pin for").count() == 1
    assert page.get_by_role("img", name="Time to first token").count() == 1
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input')]
             .filter((one) => !one.textContent.trim() && !one.labels?.length).map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_light_and_dark(watch, harbour, colours):
    """WCAG AA: 4.5 to 1, of every element that has text of its own."""
    page = watch(harbour.url, color_scheme=colours).page
    choose(page, "agent-2")
    faint = page.evaluate(CONTRAST)
    assert faint == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(17, 21, 27)") == (colours == "dark")


CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const one of document.querySelectorAll('body *')) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility() || one.closest(':disabled')) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(channels(one instanceof SVGElement ? style.fill : style.color)), light(ground(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([one.tagName, one.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return faint;
}"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_scrolls_sideways_however_long_the_names_are(watch, harbour, width):
    harbour.turn("n" * 300)
    page = watch(harbour.url, viewport={"width": width, "height": 800}).page
    row(page, "n" * 300).wait_for()
    choose(page, "n" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for dot in page.locator(".ship:not(.beyond)").all():
        box = dot.bounding_box()
        assert box["x"] + box["width"] <= width
    for box in [one.bounding_box() for one in page.locator("section").all()]:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_a_hostile_name_is_text_everywhere(watch, harbour):
    harbour.turn(HOSTILE)
    watched = watch(harbour.url)
    page = watched.page
    choose(page, HOSTILE)
    harbour.ask("POST", "/admin/demote", {"tier": "disk", "session": HOSTILE})
    expect(page.locator("#moves li").first).to_contain_text(HOSTILE)
    page.locator("#delete").click()
    expect(page.locator("#confirm-said")).to_contain_text(HOSTILE)
    page.locator("#yes").click()
    expect(page.locator("#outcome")).to_have_text("Deleted: 1 response.")
    assert page.locator("img, main script").count() == 0
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; return 'done'; } catch { return 'refused'; } }"
    )
    assert refused == "refused", "the policy stands behind the code"
    watched.said.clear()  # it says so on the console, too


def test_nothing_is_asked_while_nobody_looks(watch, harbour):
    watched = watch(harbour.url, frozen=True)
    page = watched.page
    hide = """(hidden) => {
      Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    }"""

    def looks():
        return sum("/admin/overview" in url for url in watched.requests)

    expect(page.locator("#state")).to_have_text("live")
    held = []
    page.route("**/admin/overview*", lambda route: held.append(route))
    with page.expect_request("**/admin/overview*"):
        page.clock.run_for(1500)
    page.evaluate(hide, True)  # while an answer is on its way
    with page.expect_response("**/admin/overview*"):
        held.pop().continue_()
    page.unroute("**/admin/overview*")
    expect(page.locator("#state")).to_have_text("paused")
    assert looks() == 2
    page.clock.run_for(60_000)
    assert looks() == 2
    with page.expect_response(lambda answer: "/admin/overview" in answer.url):
        page.evaluate(hide, False)
    expect(page.locator("#state")).to_have_text("live")
    assert looks() == 3


def test_a_daemon_that_goes_away_is_shown_as_gone_and_the_next_one_as_itself(
    watch, zygote, tmp_path
):
    with Harbour(zygote, tmp_path / "state") as harbour:
        for session in ("one", "two"):
            harbour.turn(session)
        page = watch(harbour.url, words_expected=True).page
        expect(page.locator("#session-rows tr")).to_have_count(2)
        harbour.kill()
        expect(page.locator("#state")).to_have_text("no answer: what is shown is old")
        expect(page.locator("#session-rows tr")).to_have_count(2)
        harbour.start()
        expect(page.locator("#state")).to_have_text("live")
        harbour.turn("three")
        expect(page.locator("#turns li[data-turn]")).to_have_count(1)  # the other's are not its
        expect(row(page, "three")).to_have_count(1)


def test_a_key_is_asked_for_kept_by_the_tab_alone_and_never_put_into_an_address(
    watch, zygote, tmp_path
):
    sets = ("auth.keys=['tenant']", "auth.operators=['operator']")
    with Harbour(zygote, tmp_path / "state", *sets) as harbour:
        harbour.turn("theirs", key="tenant")
        watched = watch(harbour.url, words_expected=True)
        page = watched.page
        door = page.get_by_role("dialog", name="An operator's key")
        field = door.get_by_label("Key, of auth.operators")
        expect(field).to_be_focused()
        page.keyboard.press("Escape")
        expect(door).to_be_visible()
        for wrong, said in (("nonsense", "Incorrect API key"), ("tenant", "operator_only")):
            field.fill(wrong)
            page.keyboard.press("Enter")
            expect(door.get_by_role("alert")).to_contain_text(said)
        assert page.locator("#session-rows tr").count() == 0
        field.fill("operator")
        door.get_by_role("button", name="Open").click()
        expect(row(page, "theirs")).to_have_count(1)
        assert page.evaluate("Object.values(sessionStorage)") == ["operator"]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert not any("operator" in url for url in watched.requests)

        choose(page, "theirs")  # a tenant's session: the operator acts for it
        order(page, "Delete …", "Delete")
        expect(page.locator("#outcome")).to_have_text("Deleted: 1 response.")
        page.reload()
        expect(page.locator("#state")).to_have_text("live")  # the tab has the key still
        other = page.context.browser.new_context().new_page()
        other.goto(harbour.url)
        expect(other.locator("#door")).to_be_visible()
        other.context.close()
