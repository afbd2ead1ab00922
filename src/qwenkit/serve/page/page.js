// The page: what is open, what is running, and what each button and key does.

const state = { conversations: [], current: null, models: [], running: new Map() }; // running: conversation id -> {node, controller}

const tabs = window.BroadcastChannel ? new BroadcastChannel("qwenkit") : null;
const MAX_SAID = 2000; // characters of an answer that are read out without being asked for

const act = {
  retry: (node) => answer(state.current, node.parent, node),
  again: (node) => answer(state.current, node.parent),
  openKey: () => showSettings("settings-key"),
  sendResults: (node) => answer(state.current, node.id),

  result(call, text) {
    call.result = text;
    save(state.current);
  },

  // Another version of a message; the focus stays on the button, which the new elements have too.
  select(node, button) {
    selectBranch(state.current, node);
    save(state.current);
    showConversation();
    document.querySelector(`[data-node="${node.id}"] [data-step="${button}"]`)?.focus();
  },

  edit(node) {
    const conversation = state.current;
    editView(document.querySelector(`[data-node="${node.id}"]`), node, (text) => {
      if (text?.trim() && !state.running.has(conversation.id)) {
        const edited = addNode(conversation, node.parent, { content: text.trim() });
        answer(conversation, edited.id);
      } else showConversation();
      $("input").focus();
    });
  },
};

// What is open.

function showConversation() {
  const conversation = state.current;
  const running = state.running.get(conversation.id);
  $("title").textContent = conversation.title || t("untitled");
  document.title = conversation.title ? `${conversation.title} · qwenkit` : "qwenkit";
  const path = pathTo(conversation, conversation.leaf);
  $("log").replaceChildren(...path.map((node) => messageView(conversation, node, act, running?.node === node)));
  if (!path.length) $("log").append(h("div", { class: "welcome" }, h("h2", {}, t("welcome")), h("p", {}, t("welcomeNote"))));
  showModels();
  showSend();
  showList();
  scrollToEnd();
}

function showSend() {
  const running = state.running.has(state.current.id);
  const button = $("send");
  button.dataset.label = running ? "stop" : "send";
  button.setAttribute("aria-label", t(button.dataset.label));
  button.title = t(button.dataset.label);
  button.replaceChildren(icon(button.dataset.label));
  button.disabled = !running && !$("input").value.trim();
  $("log").classList.toggle("busy", running);
}

function showList() {
  const focused = document.activeElement?.dataset?.list;
  state.conversations.sort((a, b) => b.updated - a.updated);
  const started = state.conversations.filter((conversation) => conversation.nodes.length);
  $("list").replaceChildren(...started.map((conversation) => {
    const title = conversation.title || t("untitled");
    const open = h("button", { type: "button", class: "open", "data-list": conversation.id, on: { click: () => openConversation(conversation) } }, title);
    const current = conversation === state.current;
    if (current) open.setAttribute("aria-current", "true");
    return h("li", { class: current ? "current" : "" }, open,
      state.running.has(conversation.id) ? h("span", { class: "dot", "aria-hidden": "true" }) : null,
      iconButton("pencil", `${t("rename")}: ${title}`, () => renameConversation(conversation)),
      iconButton("trash", `${t("delete")}: ${title}`, () => deleteConversation(conversation)));
  }));
  if (focused) document.querySelector(`[data-list="${focused}"]`)?.focus();
}

function showModels() {
  const wanted = state.current.settings.model;
  const names = state.models.includes(wanted) || !wanted ? state.models : [wanted, ...state.models];
  $("model").replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  $("model").value = wanted || state.models[0] || "";
  $("model").disabled = !names.length;
}

function openConversation(conversation) {
  state.current = conversation;
  showMenu(false);
  showConversation();
  $("input").focus();
}

function startConversation() {
  const empty = state.conversations.find((conversation) => !conversation.nodes.length);
  const fresh = empty ?? newConversation(lastSettings());
  if (!empty) state.conversations.push(fresh);
  fresh.updated = Date.now();
  openConversation(fresh);
}

function lastSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(remembered("settings") ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

async function renameConversation(conversation) {
  const title = await ask(t("renameTitle"), t("save"), conversation.title);
  if (title === null) return;
  conversation.title = title;
  save(conversation);
  showList();
  if (conversation === state.current) showConversation();
}

async function deleteConversation(conversation) {
  if (!(await ask(t("deleteTitle", conversation.title || t("untitled")), t("delete")))) return;
  state.running.get(conversation.id)?.controller.abort();
  state.running.delete(conversation.id);
  state.conversations = state.conversations.filter((other) => other !== conversation);
  await Store.remove(conversation.id);
  tabs?.postMessage("changed");
  if (conversation !== state.current) return showList();
  if (state.conversations.length) openConversation(state.conversations[0]);
  else startConversation();
}

// Keeps a conversation once something was said in it, unless it was deleted meanwhile. Other tabs hear of it, but for the parts of
// an answer that is still coming.
async function save(conversation) {
  if (!conversation.nodes.length || !state.conversations.includes(conversation)) return;
  try {
    await Store.put(conversation);
    if (!state.running.has(conversation.id)) tabs?.postMessage("changed");
  } catch {
    notice(t("noStorage"));
  }
}

// What another tab changed is read anew, so that no tab writes an old conversation over a newer one.
async function readAnew() {
  const kept = new Map(((await Store.all().catch(() => [])) ?? []).map((one) => [one.id, one]));
  for (const one of state.conversations) {
    const same = JSON.stringify(one) === JSON.stringify(kept.get(one.id));
    if (same || state.running.has(one.id) || !one.nodes.length) kept.set(one.id, one); // the views hold on to these objects
  }
  state.conversations = [...kept.values()];
  const current = kept.get(state.current.id);
  if (current === state.current) return showList();
  if (!current) return startConversation();
  state.current = current;
  showConversation();
}

// One sentence above the field, "" for none, and what may be done about it.
function notice(text, form = null) {
  const area = $("notice");
  if (!form?.isConnected) area.replaceChildren(h("span"), ...(form ? [form] : []));
  area.firstChild.textContent = text;
  area.hidden = !text;
}

// What runs.

function send() {
  const conversation = state.current;
  const text = $("input").value.trim();
  if (!text || state.running.has(conversation.id)) return;
  $("input").value = "";
  fitHeight($("input"));
  const node = addNode(conversation, conversation.leaf, { content: text });
  conversation.title ||= titleFrom(text);
  answer(conversation, node.id);
}

function stop() {
  state.running.get(state.current.id)?.controller.abort();
}

// Lets the model answer after node `parent`: in a new node, or in `failed`, whose answer did not come.
async function answer(conversation, parent, failed = null) {
  if (state.running.has(conversation.id)) return;
  const model = conversation.settings.model || state.models[0] || "";
  const body = chatRequest(conversation, pathTo(conversation, parent), model);
  const fresh = { role: "assistant", model, content: "", reasoning: "", calls: undefined, stats: undefined, error: undefined, finish: "stopped" }; // until it says otherwise
  const node = failed ? Object.assign(failed, fresh) : addNode(conversation, parent, fresh);
  const controller = new AbortController();
  state.running.set(conversation.id, { node, controller });
  conversation.updated = Date.now();
  save(conversation);
  showConversation();
  say(t("waiting"));
  let shown = 0;
  let saved = performance.now();
  const show = (running) => {
    const view = document.querySelector(`[data-node="${node.id}"]`);
    if (view && conversation === state.current) showAnswer(view, conversation, node, act, running);
    if (nearEnd) scrollToEnd();
  };
  const clock = { started: performance.now(), parts: 0 };
  try {
    for await (const chunk of streamChat(body, controller.signal)) {
      addChunk(node, chunk, clock);
      const now = performance.now();
      if (now - shown > 50) {
        show(true);
        shown = now;
      }
      if (now - saved > 1000) {
        save(conversation);
        saved = now;
      }
    }
    if (node.finish === "stopped") node.finish = "stop"; // a server that names no reason
    say(`${t("finished")} ${node.content.slice(0, MAX_SAID)}`);
  } catch (error) {
    if (controller.signal.aborted) say(t("stopped"));
    else {
      node.finish = undefined;
      node.error = error instanceof ApiError ? error.message : t("brokenStream");
    }
  }
  state.running.delete(conversation.id);
  save(conversation);
  show(false);
  if (conversation === state.current) showSend();
  showList();
}

// Asks for the models, which shows whether the key is accepted; false where no list came.
async function loadModels() {
  const wasRefused = $("key-form") !== null;
  let done = true;
  try {
    state.models = await listModels();
    notice("");
    $("key-wrong").textContent = "";
    // A model that was used last, but is not here.
    if (!state.current.nodes.length && !state.models.includes(state.current.settings.model)) state.current.settings.model = "";
  } catch (error) {
    done = false;
    if (!error.refused) notice(error.message);
  }
  if (done && wasRefused && !state.running.has(state.current.id)) showConversation(); // its markdown may have been refused
  else showModels();
  return done;
}

// What buttons and keys do.

function showMenu(open) {
  const narrow = matchMedia("(max-width: 50rem)").matches;
  document.body.classList.toggle("menu-open", open && narrow);
  $("menu").setAttribute("aria-expanded", String(open));
  $("sidebar").inert = narrow && !open;
  $("main").inert = narrow && open;
  if (open) $("close-menu").focus();
}

function showSettings(focus) {
  openSettings(state.current, (change) => {
    if (change?.key) return loadModels();
    const { model, ...settings } = state.current.settings;
    remember("settings", JSON.stringify({ ...settings, model }));
    save(state.current);
  });
  if (focus) $(focus).focus();
}

function exportFile() {
  const url = URL.createObjectURL(new Blob([exportText(state.current)], { type: "application/json" }));
  const name = (state.current.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  h("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importFile(file) {
  const conversation = file.size < 50e6 ? importText(await file.text()) : null;
  if (!conversation) return notice(t("wrongFile"));
  notice("");
  state.conversations.push(conversation);
  save(conversation);
  openConversation(conversation);
}

function wire() {
  for (const button of document.querySelectorAll("[data-icon]")) button.append(icon(button.dataset.icon));
  wireDialogs();
  if (tabs) tabs.onmessage = readAnew;
  watchScroll();
  $("new").onclick = startConversation;
  $("send").onclick = () => (state.running.has(state.current.id) ? stop() : send());
  $("menu").onclick = () => showMenu(true);
  $("close-menu").onclick = $("shade").onclick = () => {
    showMenu(false);
    $("menu").focus();
  };
  $("settings-open").onclick = () => showSettings();
  $("export").onclick = exportFile;
  $("import").onclick = () => $("file").click();
  $("file").onchange = async () => {
    await importFile($("file").files[0]);
    $("file").value = "";
  };
  $("theme").onclick = nextTheme;
  $("language").onclick = () => {
    language = language === "zh" ? "en" : "zh";
    remember("language", language);
    showTexts();
    showConversation();
    if ($("key-form")) loadModels(); // says so in the other language
  };
  $("model").onchange = () => {
    state.current.settings.model = $("model").value;
    remember("settings", JSON.stringify(state.current.settings));
    save(state.current);
  };
  const input = $("input");
  input.addEventListener("input", () => {
    fitHeight(input);
    showSend();
  });
  input.addEventListener("keydown", (event) => {
    if (!sendsOn(event)) return;
    event.preventDefault();
    send();
  });
  $("log").addEventListener("click", (event) => {
    const button = event.target.closest(".copy-code");
    if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("menu-open")) $("close-menu").click();
    else stop();
  });
  matchMedia("(max-width: 50rem)").addEventListener("change", () => showMenu(false));
  addEventListener("pagehide", () => state.conversations.filter(({ id }) => state.running.has(id)).forEach(save));
}

async function start() {
  wire();
  showTexts();
  const kept = await Store.open();
  state.conversations = (await Store.all().catch(() => [])) ?? [];
  if (state.conversations.length) {
    state.conversations.sort((a, b) => b.updated - a.updated);
    openConversation(state.conversations[0]);
  } else startConversation();
  showMenu(false);
  await loadModels();
  if (!kept && $("notice").hidden) notice(t("noStorage"));
}

start();
