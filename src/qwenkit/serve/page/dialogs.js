// The settings, the small question before a conversation is renamed or deleted, colours and language.

const THEMES = ["auto", "light", "dark"];

// Asks for a yes, or with `value` for a text; resolves to true or the text, or to null.
function ask(title, yes, value) {
  const dialog = $("ask");
  const field = $("ask-value");
  $("ask-title").textContent = title;
  $("ask-yes").textContent = yes;
  field.hidden = value === undefined;
  field.value = value ?? "";
  return new Promise((resolve) => {
    let answer = null;
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      answer = value === undefined ? true : field.value.trim();
      dialog.close();
    };
    dialog.onclose = () => resolve(answer);
    dialog.showModal();
    if (value === undefined) $("ask-yes").focus();
    else field.select();
  });
}

function wireDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
    dialog.addEventListener("mousedown", (event) => event.target === dialog && dialog.close()); // the shade around it
  }
}

// Says why a request was refused, with a field for another key. What is being typed into the field stays.
function askForKey(message) {
  const typing = $("key-form")?.contains(document.activeElement) ?? false;
  notice(message, typing ? $("key-form") : keyForm());
  $("key-wrong").textContent = apiKey() ? message : "";
  const free = [null, document.body, $("input")].includes(document.activeElement) && !$("input").value;
  if (typing) $("key").select();
  else if (free && !document.querySelector("dialog[open]")) $("key").focus();
}

function keyForm() {
  const field = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", placeholder: t("apiKey"), "aria-label": t("apiKey") });
  const submit = async (event) => {
    event.preventDefault();
    if (field.value.trim()) keepKey(field.value.trim());
    field.focus();
    if (await loadModels()) $("input").focus();
  };
  return h("form", { id: "key-form", on: { submit } }, field, h("button", { type: "submit", class: "text-button" }, t("enterKey")));
}

// Shows the settings of a conversation; `changed` is called after each change that is valid.
function openSettings(conversation, changed) {
  const form = $("settings").querySelector("form");
  const fields = [...form.querySelectorAll("[name]")];
  const show = () => {
    $("settings-key").value = apiKey();
    $("system").value = conversation.system;
    $("tools").value = conversation.tools;
    $("tools-section").open = conversation.tools !== "";
    for (const field of fields) field.value = conversation.settings[field.name];
    check();
  };
  const check = () => ($("tools-wrong").textContent = parseTools($("tools").value) === null ? t("toolsWrong") : "");
  form.onsubmit = (event) => {
    event.preventDefault(); // Enter in a field
    $("settings").close();
  };
  form.onchange = (event) => {
    const field = event.target;
    if (field.id === "settings-key") {
      keepKey(field.value.trim());
      return changed({ key: true });
    }
    if (field.name && !field.reportValidity()) return;
    if (field.id === "system" || field.id === "tools") conversation[field.id] = field.value;
    else conversation.settings[field.name] = field.value;
    check();
    changed();
  };
  $("reset").onclick = () => {
    conversation.settings = { ...DEFAULTS, model: conversation.settings.model };
    conversation.system = "";
    conversation.tools = "";
    show();
    changed();
  };
  show();
  $("settings").showModal();
}

// Texts of the document itself: elements name them in data attributes.
function showTexts() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
  $("language").textContent = t("otherLanguage");
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  showTheme();
}

function showTheme() {
  const theme = THEMES.includes(remembered("theme")) ? remembered("theme") : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = t({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[theme]);
  $("theme").replaceChildren(icon(theme));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

function nextTheme() {
  const at = THEMES.indexOf(remembered("theme") ?? "auto");
  remember("theme", THEMES[(at + 1) % THEMES.length]);
  showTheme();
}
