// The page as a client of the API: the models, a streamed answer, and markdown turned into HTML.

// Settings are kept as the fields hold them, text; "" leaves a parameter to the server.
const DEFAULTS = { model: "", temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "", thinking: "" };
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

// An error with one sentence for people; `status` is 0 where no answer came. `refused`: who asks is not let in.
class ApiError extends Error {
  constructor(message, status = 0, refused = false) {
    super(message);
    this.status = status;
    this.refused = refused;
  }
}

let keyOfPage = ""; // where the browser keeps nothing

function apiKey() {
  try {
    return sessionStorage.getItem("qwenkit.key") ?? keyOfPage;
  } catch {
    return keyOfPage;
  }
}

function keepKey(key) {
  keyOfPage = key;
  try {
    if (key) sessionStorage.setItem("qwenkit.key", key);
    else sessionStorage.removeItem("qwenkit.key");
  } catch {}
}

// Every refusal of a request shows why, and the field for another key, whichever part of the page sent it.
function refuse(key, status, error) {
  let message = key ? t("wrongKey") : t("needsKey");
  if (error?.code === "wrong_host") message = t("wrongHost", location.host);
  else if (status === 403 && error?.message && (!key || error.code === "wrong_origin")) message = sentence(error.message);
  askForKey(message);
  return new ApiError(message, status, true);
}

async function request(path, body, signal) {
  const headers = {};
  const key = apiKey();
  if (/[^\x21-\x7e]/.test(key)) throw refuse(key, 401); // no header can hold it
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(t("noServer"));
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  if ([401, 403].includes(response.status)) throw refuse(key, response.status, answer?.error);
  throw new ApiError(sentence(answer?.error?.message ?? t("status", response.status)), response.status);
}

// Errors of the API begin small and end without a point.
function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?。！？]$/.test(text) ? "" : ".");
}

async function listModels() {
  const answer = await (await request("v1/models")).json();
  return answer.data.map((model) => model.id);
}

async function renderMarkdown(text, partial) {
  return (await (await request("render", { text, partial })).json()).html;
}

// The tools of a conversation as a list; [] if there are none; null if the text is no list of objects.
function parseTools(text) {
  if (!text.trim()) return [];
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) && tools.every((tool) => tool && typeof tool === "object") ? tools : null;
  } catch {
    return null;
  }
}

function chatRequest(conversation, path, model) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const lastQuestion = path.findLastIndex((node) => node.role === "user");
  for (const [at, node] of path.entries()) {
    const calls = node.calls ?? [];
    if (node.role === "assistant" && !node.content && !calls.length) continue; // an answer that failed
    const message = { role: node.role, content: node.content };
    if (calls.length)
      message.tool_calls = calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
    if (node.reasoning && at > lastQuestion) message.reasoning_content = node.reasoning; // thinking goes on after a call
    messages.push(message);
    for (const call of calls) messages.push({ role: "tool", tool_call_id: call.id, content: call.result ?? "" });
  }
  const body = { model, messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for (const name of NUMBERS) if (conversation.settings[name] !== "") body[name] = Number(conversation.settings[name]);
  if (conversation.settings.thinking) body.chat_template_kwargs = { enable_thinking: conversation.settings.thinking === "on" };
  const tools = parseTools(conversation.tools);
  if (tools?.length) body.tools = tools;
  return body;
}

// Yields the parsed chunks of a streamed answer until [DONE]; throws ApiError for an error inside the stream or a stream cut short.
async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ApiError(t("brokenStream"));
    }
    if (part.done) throw new ApiError(t("brokenStream"));
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // names of events and comments that keep the connection open
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(sentence(chunk.error.message ?? t("brokenStream")));
      yield chunk;
    }
  }
}

// Adds one chunk to the node of an answer: what the model wrote, and when. Times are in milliseconds; tokens are counted by the
// server, or by the parts that came, which is about the same.
function addChunk(node, chunk, clock) {
  const choice = chunk.choices?.[0] ?? {};
  if (choice.finish_reason) node.finish = choice.finish_reason;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
  if (content) node.content += content;
  if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
  for (const call of calls ?? []) {
    node.calls ??= [];
    const known = (node.calls[call.index] ??= { id: call.id ?? newId(), name: "", arguments: "", result: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  const now = performance.now();
  const wrote = Boolean(content || reasoning || calls?.length);
  if (wrote) {
    clock.first ||= now;
    clock.last = now;
    clock.parts += 1;
  }
  const exact = Number.isFinite(chunk.usage?.completion_tokens);
  if (exact) clock.tokens = chunk.usage.completion_tokens;
  if (!clock.first) return;
  if (wrote && clock.parts === 1) clock.before = exact ? clock.tokens : 1;
  const tokens = clock.tokens ?? clock.parts;
  const seconds = (clock.last - clock.first) / 1000;
  const rate = tokens > clock.before && seconds > 0.05 ? (tokens - clock.before) / seconds : null;
  node.stats = { tokens, exact: clock.tokens !== undefined, rate, first: (clock.first - clock.started) / 1000 };
}
