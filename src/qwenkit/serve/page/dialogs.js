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

// Shows the settings of a conversation; `changed` is called after each change that is valid.
function openSettings(conversation, changed) {
  const form = $("settings").querySelector("form");
  const fields = [...form.querySelectorAll("[name]")];
  const show = () => {
    $("key").value = apiKey();
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
    if (field.id === "key") return setKey(field.value.trim(), changed);
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

function setKey(key, changed) {
  try {
    if (key) sessionStorage.setItem("qwenkit.key", key);
    else sessionStorage.removeItem("qwenkit.key");
  } catch {}
  changed({ key: true });
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
