// Conversations: their shape, their branches, and where the browser keeps them.
//
// A conversation is a tree of nodes. Each node names its parent; what is shown and sent is the path from the root to `leaf`.
// Editing a message or answering again adds a sibling, so nothing that was said is lost.

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

function newConversation(settings) {
  return { id: newId(), title: "", updated: Date.now(), system: "", settings: { ...settings }, tools: "", nodes: [], leaf: null };
}

function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, role: "user", content: "", ...fields };
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  return node;
}

const findNode = (conversation, id) => conversation.nodes.find((node) => node.id === id) ?? null;
const siblingsOf = (conversation, node) => conversation.nodes.filter((other) => other.parent === node.parent);

function pathTo(conversation, id) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const path = [];
  for (let node = byId.get(id); node; node = byId.get(node.parent)) path.unshift(node);
  return path;
}

// Shows the branch that goes through `node`: its newest continuation.
function selectBranch(conversation, node) {
  for (;;) {
    const next = conversation.nodes.findLast((other) => other.parent === node.id);
    if (!next) break;
    node = next;
  }
  conversation.leaf = node.id;
}

function titleFrom(text) {
  const letters = [...text.trim().split(/\s+/).join(" ")];
  return letters.length > 48 ? letters.slice(0, 47).join("") + "…" : letters.join("");
}

const FORMAT = "qwenkit-conversation";

function exportText(conversation) {
  const { title, system, settings, tools, nodes, leaf } = conversation;
  return JSON.stringify({ format: FORMAT, version: 1, title, system, settings, tools, nodes, leaf }, null, 2);
}

// A conversation from a file of exportText, or from a list of {role, content} as the API takes it; null if it is neither.
// Every field is checked: a file comes from anywhere.
function importText(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    return null;
  }
  const isText = (value) => typeof value === "string";
  const conversation = newConversation(DEFAULTS);
  const list = Array.isArray(data) ? data : data?.messages;
  if (Array.isArray(list)) {
    for (const message of list) {
      if (!isText(message?.content)) return null;
      if (message.role === "system") conversation.system = message.content;
      else if (["user", "assistant"].includes(message.role))
        addNode(conversation, conversation.leaf, { role: message.role, content: message.content });
      else return null;
    }
    conversation.title = titleFrom(conversation.nodes[0]?.content ?? "");
    return conversation;
  }
  if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(data.nodes)) return null;
  const seen = new Set([null]);
  for (const node of data.nodes) {
    if (!isText(node?.id) || seen.has(node.id) || !seen.has(node.parent)) return null; // a parent stands before its children
    if (!["user", "assistant"].includes(node.role) || !isText(node.content)) return null;
    const { id, parent, role, content } = node;
    const kept = { id, parent, role, content };
    for (const name of ["reasoning", "error", "model", "finish"]) if (isText(node[name])) kept[name] = node[name];
    if (Array.isArray(node.calls)) {
      if (!node.calls.every((call) => isText(call?.name) && isText(call.arguments))) return null;
      kept.calls = node.calls.map((call) => ({ id: String(call.id ?? newId()), name: call.name, arguments: call.arguments,
        result: isText(call.result) ? call.result : "" }));
    }
    if (Number.isFinite(node.stats?.tokens)) {
      const { tokens, rate, first, exact } = node.stats;
      kept.stats = { tokens, exact: exact === true, rate: Number.isFinite(rate) ? rate : null, first: Number.isFinite(first) ? first : null };
    }
    seen.add(id);
    conversation.nodes.push(kept);
  }
  for (const name of ["title", "system", "tools"]) if (isText(data[name])) conversation[name] = data[name];
  for (const name of Object.keys(DEFAULTS)) if (isText(data.settings?.[name])) conversation.settings[name] = data.settings[name];
  conversation.leaf = seen.has(data.leaf) ? data.leaf : conversation.nodes.at(-1)?.id ?? null;
  return conversation;
}

// IndexedDB, which holds more than localStorage and does not block. Without it (private windows) all works, and nothing stays.
const Store = {
  db: null,

  async open() {
    try {
      this.db = await new Promise((resolve, reject) => {
        const request = indexedDB.open("qwenkit", 1);
        request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
      });
    } catch {
      return false;
    }
    return true;
  },

  // Runs one request on the object store; resolves to its result, or to `undefined` where nothing is kept.
  run(mode, work) {
    if (!this.db) return Promise.resolve(undefined);
    return new Promise((resolve, reject) => {
      const transaction = this.db.transaction("conversations", mode);
      const request = work(transaction.objectStore("conversations"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  },

  all: () => Store.run("readonly", (store) => store.getAll()),
  put: (conversation) => Store.run("readwrite", (store) => store.put(conversation)),
  remove: (id) => Store.run("readwrite", (store) => store.delete(id)),
};
