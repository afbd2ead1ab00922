"""The page in a real browser: talking, stopping, branches, settings, what stays after a reload."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from qwenkit.serve.errors import ApiError
from tests.serve.conftest import wait_until
from tests.serve.page.conftest import KEY, Script, Site, VisitPage, until


def send(page: Page, text: str) -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def finished(page: Page) -> None:
    until(page, "state.running.size === 0")
    kept(page)


def kept(page: Page) -> None:
    """Waits until what the page has put into its storage is there: a reading transaction comes after those that write."""
    page.evaluate("Store.all().then(() => null)")


def sent(site: Site, number: int = -1) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in site.requests[number]["messages"]]


def test_a_conversation_streams_and_stays_after_a_reload(site: Site, visit: VisitPage) -> None:
    page = visit()
    hold = threading.Event()
    site.say(*"Here is **bold** and code:\n\n```python\nprint(1)\n```\n", pause=0.01, hold=hold)
    send(page, "Write code\nplease")
    expect(page.locator(".assistant .md")).to_contain_text("Here")
    assert page.evaluate("state.running.size") == 1, "shown while it streams"
    hold.set()
    finished(page)
    expect(page.locator(".md strong")).to_have_text("bold")
    expect(page.locator(".code .nb")).to_have_text("print")
    expect(page.locator(".stats")).to_contain_text("42 tokens")
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    expect(page.locator(".stats")).to_contain_text("first after")
    expect(page.locator("#status")).to_contain_text("The answer is complete.")
    assert site.requests[0]["model"] == "tiny-qwen"
    assert sent(site) == [("user", "Write code\nplease")]
    assert page.locator("#list .open").all_inner_texts() == ["Write code please"]
    page.reload()
    expect(page.locator(".bubble")).to_have_text("Write code\nplease")
    expect(page.locator(".md strong")).to_have_text("bold")
    site.say("Yes.")
    send(page, "More?")
    finished(page)
    assert [role for role, _ in sent(site)] == ["user", "assistant", "user"]
    assert sent(site)[1][1].startswith("Here is **bold**")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(site: Site, visit: VisitPage, way: str) -> None:
    page = visit()
    site.say(*["word "] * 1000, pause=0.02)
    send(page, "Talk")
    expect(page.locator(".md")).to_contain_text("word word")
    if way == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".stats")).to_contain_text("Stopped")
    wait_until(lambda: site.aborted == 1)
    page.reload()
    expect(page.locator(".md")).to_contain_text("word word")
    expect(page.locator(".stats")).to_contain_text("Stopped")


def test_leaving_while_it_streams_keeps_what_came(site: Site, visit: VisitPage) -> None:
    page = visit()
    site.say(*["word "] * 1000, pause=0.02)
    send(page, "Talk")
    expect(page.locator(".md")).to_contain_text("word word")
    until(
        page,
        "Store.all().then((all) => all.some((one) => one.nodes.some((node) => node.content.includes('word word'))))",
    )
    page.reload()
    expect(page.locator(".md")).to_contain_text("word word")
    expect(page.locator(".stats")).to_contain_text("Stopped")


def test_answering_again_and_editing_make_versions(site: Site, visit: VisitPage) -> None:
    page = visit()
    site.say("First.")
    send(page, "Question")
    finished(page)
    site.say("Second.")
    page.get_by_role("button", name="Answer again").click()
    finished(page)
    expect(page.locator(".md")).to_have_text("Second.")
    assert sent(site) == [("user", "Question")]
    expect(page.locator(".version")).to_have_text("2/2")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".md")).to_have_text("First.")
    expect(page.get_by_role("button", name="Next version")).to_be_enabled()

    site.say("Third.")
    page.locator(".bubble").hover()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator(".edit").press("Escape")
    expect(page.locator(".bubble")).to_have_text("Question")
    page.locator(".bubble").hover()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator(".edit").fill("Better question")
    page.locator(".edit").press("Enter")
    finished(page)
    expect(page.locator(".md")).to_have_text("Third.")
    assert sent(site) == [("user", "Better question")]
    page.locator(".user").get_by_role("button", name="Previous version").click()
    expect(page.locator(".bubble")).to_have_text("Question")
    expect(page.locator(".md")).to_have_text("Second.")


def test_conversations_are_listed_renamed_and_deleted(site: Site, visit: VisitPage) -> None:
    page = visit()
    for text in ("One", "Two"):
        page.get_by_role("button", name="New conversation").first.click()
        send(page, text)
        finished(page)
    assert page.locator("#list .open").all_inner_texts() == ["Two", "One"]
    page.locator("#list .open", has_text="One").click()
    expect(page.locator(".bubble")).to_have_text("One")
    page.get_by_role("button", name="Rename: One").click()
    page.locator("#ask-value").fill("Primus")
    page.locator("#ask-value").press("Enter")
    expect(page.locator("#title")).to_have_text("Primus")
    page.locator("#list li", has_text="Two").hover()
    page.get_by_role("button", name="Delete: Two").click()
    page.locator("#ask-yes").click()
    expect(page.locator("#list .open")).to_have_text(["Primus"])
    kept(page)
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["Primus"])
    page.get_by_role("button", name="Delete: Primus").click()
    page.keyboard.press("Escape")
    expect(page.locator("#list .open")).to_have_text(["Primus"])


def test_settings_are_sent_and_empty_ones_are_not(site: Site, visit: VisitPage) -> None:
    page = visit()
    send(page, "Plain")
    finished(page)
    assert set(site.requests[0]) == {"model", "messages", "stream", "stream_options"}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("top_p").fill("0.9")
    page.get_by_label("top_k").fill("20")
    page.get_by_label("Max tokens").fill("77")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Thinking").select_option("off")
    page.get_by_text("Tools", exact=True).click()
    page.locator("#tools").fill("[{")
    page.locator("#tools").press("Tab")
    expect(page.locator("#tools-wrong")).to_contain_text("not a JSON list")
    page.locator("#tools").fill('[{"type": "function", "function": {"name": "add"}}]')
    page.get_by_role("button", name="Done").click()
    page.locator("#model").select_option("other-qwen")
    send(page, "With settings")
    finished(page)
    request = site.requests[1]
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "model")} == {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 77,
        "seed": 5,
        "model": "other-qwen",
    }
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert request["tools"] == [{"type": "function", "function": {"name": "add"}}]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_role("button", name="Back to defaults").click()
    expect(page.get_by_label("Seed")).to_have_value("")


def test_a_key_is_asked_for_and_kept_for_the_tab_only(site: Site, visit: VisitPage) -> None:
    site.key = KEY
    page = visit()
    expect(page.locator("#notice")).to_contain_text("The server wants an API key.")
    send(page, "Hello")
    expect(page.locator(".problem")).to_contain_text("The server wants an API key.")
    page.locator("#notice button").click()
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model")).to_have_value("tiny-qwen")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    expect(page.locator(".md")).to_have_text("And so on.")
    assert len(site.requests[0]["messages"]) == 1
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert KEY not in page.evaluate("JSON.stringify({...localStorage})")


def test_errors_are_one_sentence_with_a_way_on(site: Site, visit: VisitPage) -> None:
    page = visit()
    site.scripts.append(Script([], error=ApiError(400, "the prompt is 9000 tokens long, the context 4096")))
    send(page, "Long")
    expect(page.locator(".problem p")).to_have_text("The prompt is 9000 tokens long, the context 4096.")
    site.say("Half an", breaks="the request failed (id 7)")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".problem p")).to_have_text("The request failed (id 7).")
    expect(page.locator(".md")).to_have_text("Half an")
    page.reload()
    expect(page.locator(".problem p")).to_have_text("The request failed (id 7).")
    site.say("Whole.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".md")).to_have_text("Whole.")
    expect(page.locator(".problem p")).to_have_count(0)
    page.context.set_offline(True)
    send(page, "Anyone?")
    expect(page.locator(".problem p")).to_have_text("The server cannot be reached.")


def test_thinking_is_folded_and_calls_are_shown_and_answered(site: Site, visit: VisitPage) -> None:
    page = visit()
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    deltas = [{"reasoning_content": "I need "}, {"reasoning_content": "the weather."}, {"tool_calls": [call]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city"', ': "Oslo"}')]
    site.scripts.append(Script(deltas, finish="tool_calls"))
    send(page, "Weather?")
    finished(page)
    expect(page.locator(".thought-text")).to_be_hidden()
    page.locator(".thought summary").click()
    expect(page.locator(".thought-text")).to_have_text("I need the weather.")
    expect(page.locator(".call summary")).to_have_text("Call of weather")
    page.locator(".call summary").click()
    expect(page.locator(".call pre")).to_contain_text('"city": "Oslo"')
    page.locator(".call textarea").fill("rain")
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(".md").last).to_have_text("And so on.")
    messages = site.requests[1]["messages"]
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert messages[1]["tool_calls"] == [{"id": "call-1", "type": "function", "function": function}]
    assert messages[1]["reasoning_content"] == "I need the weather."
    assert messages[2] == {"role": "tool", "tool_call_id": "call-1", "content": "rain"}


def test_a_conversation_travels_as_json(site: Site, visit: VisitPage, tmp_path: Path) -> None:
    page = visit()
    site.say("An answer.")
    send(page, "A question")
    finished(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this conversation").click()
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    assert download.value.suggested_filename == "A-question.json"
    page.get_by_role("button", name="Delete: A question").click()
    page.locator("#ask-yes").click()
    expect(page.locator(".bubble")).to_have_count(0)
    page.locator("#file").set_input_files(file)
    expect(page.locator(".bubble")).to_have_text("A question")
    expect(page.locator(".md")).to_have_text("An answer.")
    expect(page.locator(".stats")).to_contain_text("42 tokens")

    list_file = tmp_path / "list.json"
    list_file.write_text(json.dumps([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]))
    page.locator("#file").set_input_files(list_file)
    expect(page.locator(".bubble")).to_have_text("U")

    data = json.loads(file.read_text())
    data["nodes"][0]["parent"] = data["nodes"][1]["id"]  # a circle
    wrong = tmp_path / "wrong.json"
    for text in (json.dumps(data), "{}", "null", "no JSON", '[{"role": "user", "content": 5}]'):
        wrong.write_text(text)
        page.evaluate("notice('')")
        page.locator("#file").set_input_files(wrong)
        expect(page.locator("#notice")).to_have_text("This file is not a conversation.")


def test_an_answer_goes_on_while_another_conversation_is_open(site: Site, visit: VisitPage) -> None:
    page = visit()
    site.say(*["slow "] * 30, "end.", pause=0.03)
    send(page, "Slow")
    expect(page.locator(".md")).to_contain_text("slow")
    page.get_by_role("button", name="New conversation").first.click()
    send(page, "Fast")
    expect(page.locator(".md")).to_have_text("And so on.")
    finished(page)
    page.locator("#list .open", has_text="Slow").click()
    expect(page.locator(".md")).to_contain_text("slow end.")


def test_a_window_without_storage_still_talks(site: Site, visit: VisitPage) -> None:
    page = visit()
    page.add_init_script("Object.defineProperty(window, 'indexedDB', {get() { throw new Error('no'); }})")
    page.reload()
    expect(page.locator("#notice")).to_contain_text("keeps no data")
    send(page, "Hello")
    expect(page.locator(".md")).to_have_text("And so on.")


def test_two_tabs_do_not_overwrite_each_other(site: Site, visit: VisitPage) -> None:
    first = visit()
    send(first, "From the first")
    finished(first)
    second = first.context.new_page()
    second.goto(site.url)
    expect(second.locator(".bubble")).to_have_text(["From the first"])
    send(second, "From the second")
    finished(second)
    expect(first.locator(".bubble")).to_have_text(["From the first", "From the second"])
    send(first, "And again")
    finished(first)
    assert [text for role, text in sent(site) if role == "user"] == ["From the first", "From the second", "And again"]
    expect(second.locator(".bubble")).to_have_count(3)
    second.get_by_role("button", name="Delete: From the first").click()
    second.locator("#ask-yes").click()
    expect(first.locator(".bubble")).to_have_count(0)
    assert first.locator("#list .open").count() == 0


@pytest.mark.parametrize(
    ("locale", "refused", "name"),
    [("en-GB", "This key is not accepted.", "Enter the key"), ("zh-CN", "此密钥未被接受。", "")],
)
def test_a_wrong_key_is_said_and_its_field_shown_again(
    site: Site, visit: VisitPage, locale: str, refused: str, name: str
) -> None:
    site.key = KEY
    page = visit(locale=locale)
    for wrong in ("wrong", "schlüssel", "密钥"):  # the last two fit into no header
        page.locator("#key").fill(wrong)
        page.locator("#key-form button").click()
        expect(page.locator("#notice span")).to_have_text(refused)
        expect(page.locator("#key")).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
    if name:
        expect(page.locator("#key-form button")).to_have_text(name)
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model")).to_have_value("tiny-qwen")


@pytest.mark.parametrize("width", [1100, 390])
def test_formulas_are_drawn(site: Site, visit: VisitPage, width: int) -> None:
    page = visit(viewport={"width": width, "height": 760})
    site.say(
        "So \\(a_1*b*c", "\\) is $5 and \\[\\sum_{i=1}^n \\frac{1}{i^2}", "\\] and `$x$` <script>alert(1)</script>"
    )
    send(page, "Hello")
    finished(page)
    expect(page.locator(".md math")).to_have_count(2)
    expect(page.locator(".md code")).to_have_text("$x$")
    assert page.locator(".md math").evaluate_all("all => all.every((math) => math.getBoundingClientRect().height > 8)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
