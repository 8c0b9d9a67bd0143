"""The dashboard over the daemon as it is served: a turn that ran shows with the tokens that its usage says."""

from playwright.sync_api import expect

from broker.bench.client import call
from tests.browser import chromium


def test_a_turn_of_the_real_model_is_on_the_page_with_its_own_usage(daemon):
    body = {"input": "Name three boats.", "prompt_cache_key": "seen", "max_output_tokens": 4}
    first = call("POST", daemon.url, "/v1/responses", body)
    body |= {"previous_response_id": first["id"], "input": "And a fourth."}
    usage = call("POST", daemon.url, "/v1/responses", body)["usage"]
    said, requests = [], []
    with chromium.opened() as browser:
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(daemon.url)
        page.get_by_role("button", name="seen").click()
        newest = page.locator("#turns li[data-turn]").first
        cached = usage["homeport:cached_by_tier"]["device"]
        computed = usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"]
        expect(newest).to_contain_text(f"computed {computed} + device {cached}")
        report = call("GET", daemon.url, "/admin/tiers")
        used = {tier["tier"]: str(tier["used_bytes"]) for tier in report["tiers"]}
        expect(page.locator(".tier.device .used")).to_have_attribute("value", used["device"])
    assert said == []
    assert all(one.startswith((daemon.url, "data:")) for one in requests)
