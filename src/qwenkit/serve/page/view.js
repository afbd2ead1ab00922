// Messages as elements. Text goes in as text; only HTML of the server's render route, which is safe, goes in as HTML.

const $ = (id) => document.getElementById(id);

// An element with attributes, listeners (`on`) and children; null children are left out.
function h(tag, { on = {}, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  for (const [type, listener] of Object.entries(on)) element.addEventListener(type, listener);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function iconButton(name, label, action) {
  return h("button", { type: "button", class: "icon", "aria-label": label, title: label, on: { click: action } }, icon(name));
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "unseen" }); // pages without TLS have no clipboard
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  say(t("copied"));
  const before = button.firstChild;
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(before), 1500);
}

// Tells those who listen instead of look.
function say(text) {
  $("status").textContent = text;
}

// Markdown. One text of an element is rendered at a time and at most every 150 ms; slow renders leave the server twice the time
// they took. Texts seen before come from `rendered`.

const policy = window.trustedTypes?.createPolicy("qwenkit", { createHTML: (html) => html }) ?? { createHTML: (html) => html };
const rendered = new Map();
const jobs = new WeakMap();

async function htmlOf(text, partial) {
  const key = `${partial ? "…" : "."}${text}`;
  let html = rendered.get(key);
  if (html === undefined) {
    html = await renderMarkdown(text, partial);
    rendered.set(key, html);
    if (rendered.size > 64) rendered.delete(rendered.keys().next().value);
  }
  return html;
}

// While an answer is running, a formula that is open at its end is not yet markdown.
async function showMarkdown(element, text, running) {
  const job = jobs.get(element) ?? { active: false };
  jobs.set(element, job);
  job.text = text;
  job.partial = running && /[\\$]/.test(text);
  if (job.active) return;
  job.active = true;
  if (!element.firstChild) showPlain(element, text);
  while (job.shown !== job.text || job.shownPartial !== job.partial) {
    const { text: wanted, partial } = job;
    const started = performance.now();
    try {
      patch(element, await htmlOf(wanted, partial));
    } catch {
      showPlain(element, wanted);
    }
    job.shown = wanted;
    job.shownPartial = partial;
    if (nearEnd) scrollToEnd();
    const pause = Math.max(150, 2 * (performance.now() - started));
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  job.active = false;
}

function showPlain(element, text) {
  element.replaceChildren(h("p", { class: "plain" }, text));
}

// Replaces only blocks that changed, so that a selection, or a wide block scrolled sideways, survives the next tokens.
function patch(element, html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  for (const block of template.content.querySelectorAll(".code")) {
    const button = h("button", { type: "button", class: "icon copy-code", "aria-label": t("copy"), title: t("copy") }, icon("copy"));
    block.prepend(h("div", { class: "code-head" }, h("span", {}, block.dataset.language), button));
    block.querySelector("pre").tabIndex = 0; // to be scrolled by keyboard
  }
  for (const table of template.content.querySelectorAll("table")) {
    const frame = h("div", { class: "wide-table", tabindex: "0" });
    table.replaceWith(frame);
    frame.append(table);
  }
  const fresh = [...template.content.childNodes];
  const old = [...element.childNodes];
  let same = 0;
  while (same < fresh.length && same < old.length && old[same].isEqualNode(fresh[same])) same += 1;
  for (const node of old.slice(same)) node.remove();
  element.append(...fresh.slice(same));
}

// Following the end of an answer, unless the reader has scrolled up.

let nearEnd = true;

function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
  nearEnd = true;
}

function watchScroll() {
  const area = $("scroll");
  area.addEventListener("scroll", () => (nearEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 60));
}

// One message. `act` has the functions that its buttons call.

function messageView(conversation, node, act, running) {
  const view = h("article", { class: `message ${node.role}`, "data-node": node.id, "aria-label": node.role === "user" ? t("you") : node.model ?? "" });
  if (node.role === "user") {
    view.append(h("div", { class: "bubble" }, node.content), messageTools(conversation, node, act));
    return view;
  }
  view.append(h("details", { class: "thought", hidden: "" }, h("summary"), h("div", { class: "thought-text" })));
  view.append(h("div", { class: "md" }), h("div", { class: "calls" }), h("div", { class: "problem" }), h("div", { class: "foot" }));
  showAnswer(view, conversation, node, act, running);
  return view;
}

// Brings the element of an answer up to its node; called for each part that comes.
function showAnswer(view, conversation, node, act, running) {
  const [thought, body, calls, problem, foot] = view.children;
  view.setAttribute("aria-busy", String(running));
  view.classList.toggle("running", running);
  if (node.reasoning) {
    thought.hidden = false;
    thought.firstChild.textContent = running && !node.content ? t("thinkingNow") : t("thought");
    thought.lastChild.textContent = node.reasoning;
  }
  if (node.content.trim()) showMarkdown(body, node.content, running);
  showCalls(calls, conversation, node, act, running);
  const empty = running && !node.content && !node.reasoning && !node.calls;
  view.classList.toggle("empty", empty);
  if (!running && node.error && !problem.firstChild) {
    const key = Object.values(TEXTS).some(({ needsKey, wrongKey }) => [needsKey, wrongKey].includes(node.error));
    problem.setAttribute("role", "alert");
    problem.append(h("p", {}, node.error), h("div", { class: "buttons" },
      key ? h("button", { type: "button", class: "text-button", on: { click: act.openKey } }, t("enterKey")) : null,
      h("button", { type: "button", class: "text-button retry", on: { click: () => act.retry(node) } }, icon("again"), t("retry"))));
  }
  const failed = node.error && !node.content; // nothing to copy, and a retry stands above
  if (running || failed) foot.replaceChildren(h("span", { class: "stats" }, statsText(node, running)));
  else foot.replaceChildren(messageTools(conversation, node, act), h("span", { class: "stats" }, statsText(node, running)));
}

function statsText(node, running) {
  const { tokens, exact, rate, first } = node.stats ?? {};
  const about = exact ? "" : "≈ ";
  const parts = [];
  if (tokens) parts.push(about + t("tokens", tokens.toLocaleString(language)));
  if (rate) parts.push(about + t("rate", rate.toFixed(rate < 10 ? 2 : 1)));
  if (first) parts.push(t("first", first.toFixed(2)));
  if (node.finish === "length") parts.push(t("cut"));
  if (node.finish === "stopped" && !running) parts.push(t("stopped"));
  return parts.join(" · ");
}

function showCalls(element, conversation, node, act, running) {
  const calls = node.calls ?? [];
  calls.forEach((call, index) => {
    let item = element.children[index];
    if (!item) {
      item = h("details", { class: "call" }, h("summary"), h("pre", { tabindex: "0" }));
      element.append(item);
    }
    item.firstChild.textContent = t("call", call.name);
    item.children[1].textContent = pretty(call.arguments);
    if (!running && item.children.length === 2) {
      const field = h("textarea", { rows: "2", class: "mono", placeholder: t("resultHint"), "aria-label": `${t("result")}: ${call.name}` });
      field.value = call.result ?? "";
      field.addEventListener("change", () => act.result(call, field.value));
      item.append(h("label", { class: "hint" }, t("result")), field);
    }
  });
  if (!running && calls.length && element.lastChild.tagName !== "BUTTON")
    element.append(h("button", { type: "button", class: "text-button", on: { click: () => act.sendResults(node) } }, t("sendResults")));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet
  }
}

function messageTools(conversation, node, act) {
  const bar = h("div", { class: "tools" });
  const versions = siblingsOf(conversation, node);
  if (versions.length > 1) {
    const at = versions.indexOf(node);
    const step = (name, label, other) => {
      const button = iconButton(name, label, () => act.select(other, name));
      button.disabled = !other;
      button.classList.add("changes");
      button.dataset.step = name;
      return button;
    };
    bar.append(step("left", t("previous"), versions[at - 1]));
    bar.append(h("span", { class: "version", "aria-label": t("version", at + 1, versions.length) }, `${at + 1}/${versions.length}`));
    bar.append(step("right", t("next"), versions[at + 1]));
  }
  const copy = iconButton("copy", t("copy"), () => copyText(node.content, copy));
  bar.append(copy);
  const change = node.role === "user" ? iconButton("pencil", t("edit"), () => act.edit(node)) : iconButton("again", t("regenerate"), () => act.again(node));
  change.classList.add("changes"); // not while an answer is running
  bar.append(change);
  return bar;
}

// A field in the place of a message of the user; `done` gets the new text, or null.
function editView(view, node, done) {
  const field = h("textarea", { class: "edit", "aria-label": t("edit") });
  field.value = node.content;
  field.addEventListener("input", () => fitHeight(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      done(null);
    } else if (sendsOn(event)) {
      event.preventDefault();
      done(field.value);
    }
  });
  view.classList.add("editing");
  view.replaceChildren(field, h("div", { class: "buttons" },
    h("button", { type: "button", class: "text-button", on: { click: () => done(null) } }, t("cancel")),
    h("button", { type: "button", class: "main", on: { click: () => done(field.value) } }, t("send"))));
  fitHeight(field);
  field.focus();
}

// Enter sends, except while an input method composes a word: there it only ends the word.
function sendsOn(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}
