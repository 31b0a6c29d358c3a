"use strict";

const SIDES = ["before", "after"];
const TITLES = { before: "Before", after: "After" };
const $ = (id) => document.getElementById(id);
let stopper = null;

function show(side, name, text) {
  $(side).querySelector(`[data-value="${name}"]`).textContent = text;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refuse(answer) {
  let text = `status ${answer.status}`;
  try {
    text = (await answer.json()).error.message;
  } catch {
    // no JSON: the status is all there is to say
  }
  throw new Error(text);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function requestOf(prompt) {
  const isChat = $("mode").value === "chat";
  const wish = isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  return {
    route: isChat ? "v1/chat/completions" : "v1/completions",
    body: JSON.stringify({
      ...wish,
      temperature: 0,
      max_tokens: Number($("max-tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  };
}

async function ask(side, { route, body }, signal) {
  const box = $(side).querySelector(".answer");
  const started = performance.now();
  let first = null;
  let tokens = null;
  const answer = await fetch(`${side}/${route}`, { method: "POST", headers: headers(), body, signal });
  if (!answer.ok) await refuse(answer);
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const choice = (event.choices || [])[0];
    const text = choice ? choice.text || (choice.delta && choice.delta.content) || "" : "";
    if (text) {
      if (first === null) {
        first = performance.now();
        show(side, "first", `${Math.round(first - started)} ms`);
      }
      box.textContent += text;
    }
    if (event.usage) tokens = event.usage.completion_tokens;
  }
  const seconds = first === null ? 0 : (performance.now() - first) / 1000;
  if (tokens !== null) show(side, "tokens", String(tokens));
  if (tokens > 1 && seconds > 0) show(side, "rate", ((tokens - 1) / seconds).toFixed(1));
}

async function guarded(side, request, signal) {
  try {
    await ask(side, request, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    const box = $(side).querySelector(".answer");
    box.classList.add("failed");
    box.textContent += error.message;
  }
}

async function refresh() {
  const answer = await fetch("sides", { headers: headers() });
  if (!answer.ok) await refuse(answer);
  const sides = await answer.json();
  for (const side of SIDES) {
    $(`${side}-title`).textContent = `${TITLES[side]}: ${sides[side].id}`;
    show(side, "memory", `${(sides[side].memory_bytes / 1e6).toFixed(0)} MB`);
  }
}

async function askBoth(event) {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (!prompt || stopper) return;
  stopper = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  for (const side of SIDES) {
    const box = $(side).querySelector(".answer");
    box.classList.remove("failed");
    box.textContent = "";
    for (const name of ["first", "rate", "tokens"]) show(side, name, "");
  }
  const { signal } = stopper;
  const request = requestOf(prompt);
  $("status").textContent = "Both are answering.";
  if ($("turns").checked) {
    for (const side of SIDES) if (!signal.aborted) await guarded(side, request, signal);
  } else {
    await Promise.all(SIDES.map((side) => guarded(side, request, signal)));
  }
  try {
    await refresh();
    $("status").textContent = signal.aborted ? "Stopped." : "Both have answered.";
  } catch (error) {
    $("status").textContent = error.message;
  }
  stopper = null;
  $("ask").disabled = false;
  $("stop").disabled = true;
}

function stop() {
  if (stopper) stopper.abort();
}

async function open() {
  for (const side of SIDES) {
    $(side).append($("side").content.cloneNode(true));
    $(side).querySelector("h2").id = `${side}-title`;
    $(side).querySelector("h2").textContent = TITLES[side];
    $(side).querySelector(".answer").setAttribute("aria-label", `${TITLES[side]}: the answer`);
  }
  $("form").addEventListener("submit", askBoth);
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
    if (event.key === "Escape") stop();
  });
  const { key } = await (await fetch("needs")).json();
  $("key-row").hidden = !key;
  if (key) $("key").addEventListener("change", () => refresh().catch((e) => { $("status").textContent = e.message; }));
  else await refresh();
  (key ? $("key") : $("prompt")).focus();
}

open();
