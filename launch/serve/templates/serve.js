"use strict";
const at = id => document.getElementById(id);
const tokens = [];  // of the text at hand: what the server told of each
let stopping = null, chosen = -1;

const escapeForSeeing = text => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const percent = share => share >= 0.9995 ? "100 %" : share >= 0.0995 ? (100 * share).toFixed(0) + " %" : share >= 0.001 ? (100 * share).toFixed(1) + " %" : "< 0.1 %";
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;

function made(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

const COLOURS = {
  gate: {
    low: "global", high: "local", scale: "var(--global), var(--card), var(--local)",
    of: token => { const side = 2 * mean(token.gates) - 1; return [side < 0 ? "var(--global)" : "var(--local)", Math.abs(side)]; },
  },
  surprise: {
    low: "expected", high: "surprising", scale: "var(--card), var(--surprise)",
    of: token => ["var(--surprise)", Math.min(1, -token.log / 7)],
  },
  none: null,
};

function paint(span, token) {
  const colour = COLOURS[at("colour").value];
  if (!colour) return span.style.removeProperty("background");
  const [tone, share] = colour.of(token);
  span.style.background = `color-mix(in srgb, ${tone} ${(100 * share).toFixed(1)}%, var(--card))`;
}

function paintAll() {
  const colour = COLOURS[at("colour").value];
  at("scale").hidden = !colour;
  if (colour) {
    at("low").textContent = colour.low;
    at("high").textContent = colour.high;
    at("scale").style.setProperty("--scale", colour.scale);
  }
  for (const token of tokens) paint(token.span, token);
}

function line(name, share, said, kind = "", own = false) {
  const row = made("div", own ? "line own" : "line");
  const bar = made("span", "bar-of " + kind), inside = made("b");
  inside.style.width = (100 * share).toFixed(1) + "%";
  bar.append(inside);
  row.append(made("span", "", name), bar, made("span", "", said));
  return row;
}

function choose(index) {
  if (!tokens[index]) return;
  if (tokens[chosen]) tokens[chosen].span.setAttribute("aria-selected", "false");
  chosen = index;
  const token = tokens[index], panel = at("panel");
  token.span.setAttribute("aria-selected", "true");
  at("text").setAttribute("aria-activedescendant", token.span.id);
  panel.replaceChildren(
    made("div", "name", escapeForSeeing(token.text)),
    made("div", "soft", `token ${index + 1}, probability ${percent(Math.exp(token.log))}`),
    made("h3", "", "What was likely here"));
  const likely = Object.entries(token.likely);
  if (!(token.text in token.likely)) likely.push([token.text, token.log]);
  for (const [name, log] of likely) {
    panel.append(line(escapeForSeeing(name), Math.exp(log), percent(Math.exp(log)), "", name === token.text));
  }
  panel.append(made("h3", "", "Global (0) or local (1), by block"));
  token.gates.forEach((gate, block) => panel.append(line(`block ${block + 1}`, gate, gate.toFixed(2), "gate")));
  panel.append(made("h3", "", "Pool rows read, with their shares"));
  token.rows.forEach((routers, block) => {
    routers.forEach((pairs, router) => {
      const row = made("div", "pool");
      const read = made("span");
      for (const [number, share] of pairs) read.append(made("code", "", `${number} · ${percent(share)}`), " ");
      row.append(made("span", "soft", router ? "second router" : `block ${block + 1}, global`), read);
      panel.append(row);
    });
  });
}

function take(choice) {
  const tops = choice.logprobs.top_logprobs, logs = choice.logprobs.token_logprobs;
  choice.routing.forEach((told, i) => {
    if (!told.text) return;  // inside a character, which comes with a later token
    const token = { ...told, log: logs[i], likely: tops[i], span: made("span", "", told.text) };
    token.span.setAttribute("role", "option");
    token.span.setAttribute("aria-selected", "false");
    token.span.id = "token-" + tokens.length;
    token.span.dataset.index = tokens.length;
    tokens.push(token);
    paint(token.span, token);
    at("text").append(token.span);
  });
}

function body(prompt) {
  const asked = { prompt, stream: true, logprobs: 6, routing: true };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"]) {
    if (at(name).value !== "") asked[name] = Number(at(name).value);
  }
  return JSON.stringify(asked);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function write() {
  const prompt = at("prompt").value, began = performance.now();
  problem("");
  tokens.length = 0;
  chosen = -1;
  at("text").replaceChildren(made("span", "soft", prompt));
  at("panel").replaceChildren(made("p", "soft small", "Choose a token, with a click or the arrow keys, to see what the model read for it."));
  at("result").hidden = false;
  at("start").disabled = true;
  at("stop").hidden = false;
  at("more").hidden = true;
  at("said").textContent = "waiting…";
  stopping = new AbortController();
  let ended = "stopped";
  try {
    const response = await fetch("/v1/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: body(prompt), signal: stopping.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        take(choice);
        if (choice.finish_reason) ended = choice.finish_reason === "stop" ? "the model ended its text" : "all tokens asked for";
      }
      at("said").textContent = `${tokens.length} tokens…`;
    }
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "not finished";
    if (error.name !== "AbortError") problem(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
  const seconds = (performance.now() - began) / 1000;
  at("said").textContent = `${ended}; ${tokens.length} tokens in ${seconds.toFixed(1)} s`;
  at("start").disabled = false;
  at("stop").hidden = true;
  at("more").hidden = tokens.length === 0;
  at("result").dataset.ended = ended;
}

at("form").addEventListener("submit", event => { event.preventDefault(); write(); });
at("stop").addEventListener("click", () => stopping.abort());
at("more").addEventListener("click", () => { at("prompt").value = at("text").textContent; write(); });
at("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !at("start").disabled) { event.preventDefault(); write(); }
});
at("colour").addEventListener("change", paintAll);
at("text").addEventListener("click", event => { if (event.target.dataset.index) choose(Number(event.target.dataset.index)); });
at("text").addEventListener("keydown", event => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  choose(chosen < 0 ? 0 : Math.min(tokens.length - 1, Math.max(0, chosen + by)));
});
paintAll();
