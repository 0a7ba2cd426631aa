// The live part of the page: ask and watch a trace grow; change a memory line, run from there, keep the correction.
// Texts go into the page as text nodes only. A trace here is {question, choices, gold, lines, prediction, verdict}, a line
// {kind, text, p, fact, source}, as in the page's own data; the server speaks of steps with kinds.
"use strict";
(() => {
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const { unsure, memory, traces } = JSON.parse(document.getElementById("data").textContent);
  const example = traces.length ? traces[0].question : "";
  let numbered = 0;

  function make(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  function button(text, press, className = "") {
    const made = make("button", className, text);
    made.type = "button";
    made.addEventListener("click", press);
    return made;
  }

  function field(tag, name, value, rows) {
    const made = document.createElement(tag);
    made.id = `live-${++numbered}`;
    made.value = value;
    if (rows) made.rows = rows;
    else made.type = "text";
    const label = make("label", "", name);
    label.htmlFor = made.id;
    return [label, made];
  }

  // Enter alone; with Shift it breaks the line, and it may end a word of an input method.
  function onEnter(element, act) {
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      act();
    });
  }

  function status() {
    const made = make("p", "told");
    made.role = "status";
    return made;
  }

  function tell(place, text, bad = false) {
    place.textContent = text;
    place.classList.toggle("bad", bad);
  }

  // What goes wrong is an Error in the server's words.
  async function post(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (reply.ok) return reply;
    const said = await reply.json().catch(() => ({}));
    const later = reply.headers.get("Retry-After");
    throw new Error((said.error || `the server answered ${reply.status}`) + (later ? ` (in ${later} s)` : ""));
  }

  // Each line of the reply is the trace so far; returns the last one.
  async function stream(path, body, signal, show) {
    const reader = (await post(path, body, signal)).body.getReader();
    const decoder = new TextDecoder();
    let [rest, trace] = ["", null];
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      const last = lines.filter(Boolean).pop();
      if (last) {
        trace = received(JSON.parse(last));
        if (trace.error) throw new Error(trace.error);
        show(trace);
      }
      if (done) break;
    }
    if (!trace || !trace.done) throw new Error("the connection was lost");
    return trace;
  }

  function received(event) {
    const lines = event.steps.map((step) => ({ ...step, kind: step.kinds.join("+"), p: step.confidence }));
    return { ...event, gold: event.answer, lines };
  }

  function sent(trace, lines) {
    const steps = lines.map((line) => ({
      kinds: line.kinds || (line.kind.length > 1 ? line.kind.split("+") : line.kind ? [line.kind] : []),
      text: line.text,
      ...(line.source ? { source: line.source } : {}),
    }));
    return { question: trace.question, choices: trace.choices || [], steps };
  }

  const tone = (kind) => ["memory", "reason"].find((name) => kind.split("+")[0] === name) || "line";
  const chip = (kind) => make("span", `chip ${tone(kind)}`, kind || "line");
  const said = (text) => make("span", "said", text);

  function sure(p) {
    const meter = make("i");
    meter.setAttribute("aria-hidden", "true");
    meter.style.setProperty("--p", `${100 * p}%`);
    return make("span", "sure", make("span", "hidden", "probability "), p.toFixed(2), meter);
  }

  // The same element as the page's own for a line of a trace.
  function drawLine(line) {
    const known = typeof line.p === "number";
    const doubt = known && line.p < unsure[0]; // of one run
    const below = [];
    if (typeof line.fact === "boolean") below.push(make("span", String(line.fact), line.fact ? "✓ true" : "✗ false"));
    if (doubt) below.push(make("span", "doubt", "? unsure"));
    if (line.given) below.push(make("span", "", line.source ? `given, from ${line.source}` : "given"));
    else if (line.differs) below.push(make("span", "", "≠ differs"));
    if (line.source && !line.given) below.push(make("span", "source", `retrieved: ${line.source}`));
    if (line.own) below.push(make("span", "", `the model had: ${line.own}`));
    const classes = `step ${tone(line.kind)}${doubt ? " unsure" : ""}${line.given ? " given" : ""}`;
    const made = make("li", classes, chip(line.kind), said(line.text));
    if (known) made.append(sure(line.p));
    if (below.length) made.append(make("span", "below", ...below));
    return made;
  }

  function drawAnswer(trace) {
    const letter = LETTERS.indexOf(trace.prediction || "-");
    const choice = letter >= 0 && trace.choices && trace.choices[letter];
    const words = trace.prediction ? trace.prediction + (choice ? ` (${choice})` : "") : "(none)";
    const made = make("li", "step answer", make("span", "chip", "answer"), said(words));
    if (trace.verdict) {
      const right = trace.verdict === "correct";
      made.append(make("span", "below", make("span", trace.verdict, right ? "✓ right" : `✗ gold ${trace.gold}`)));
    }
    return made;
  }

  // Lines from `first` on, and the answer as soon as there is one.
  function drawTail(box, trace, first) {
    const ended = trace.done !== false;
    const drawn = trace.lines.slice(first).map(drawLine);
    if (trace.prediction || ended) drawn.push(drawAnswer(trace));
    box.classList.toggle("writing", !ended);
    box.replaceChildren(...drawn);
  }

  // ---- ask

  function askBox() {
    const box = make("section", "ask");
    const [label, question] = field("textarea", "Question", "", 2);
    const [choicesLabel, choices] = field("textarea", "One choice a line", "", 3);
    const more = make("details", "", make("summary", "", "Choices"), choicesLabel, choices);
    const told = status();
    const answers = make("div", "answers");
    const go = button("Ask", () => form.requestSubmit(), "main");
    const form = make("form", "", label, question, make("div", "buttons", go, told), more);
    question.required = true;
    question.placeholder = example ? `for example: ${example}` : "";
    question.maxLength = 4000;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const options = choices.value.split("\n").map((line) => line.trim()).filter(Boolean);
      ask({ question: question.value.trim(), choices: options }, answers, told);
    });
    onEnter(question, () => form.requestSubmit());
    const title = make("h2", "", "Ask the model");
    title.id = "ask-title";
    box.setAttribute("aria-labelledby", title.id);
    if (memory) box.append(title, make("p", "note", `Memory lines are looked up, ${memory}.`), form, answers);
    else box.append(title, form, answers);
    return box;
  }

  async function ask(body, answers, told) {
    const leaving = new AbortController();
    const stop = button("Stop", () => leaving.abort());
    const tail = make("ol", "lines");
    const box = make("article", "", make("h3", "", body.question), tail, stop);
    if (body.choices.length) {
      box.insertBefore(make("ol", "choices", ...body.choices.map((choice) => make("li", "", choice))), tail);
    }
    answers.prepend(box);
    const show = (so) => {
      drawTail(tail, so, 0);
      tell(told, so.begun ? "writing …" : "waiting for the model …");
    };
    try {
      const trace = await stream("/ask", body, leaving.signal, show);
      trace.lines.forEach((line, place) => tools(trace, place, tail.children[place]));
      tell(told, trace.faults.length ? `done; ${trace.faults.join(", ")}` : "done");
    } catch (error) {
      tail.classList.remove("writing");
      if (!tail.childElementCount) box.remove();
      tell(told, leaving.signal.aborted ? "stopped" : `Not answered: ${error.message}`, !leaving.signal.aborted);
    }
    stop.remove();
  }

  // ---- change a line and run from there

  // A button on a line of a whole trace, among its figures; on memory lines only.
  function tools(trace, place, container) {
    const line = trace.lines[place];
    if (tone(line.kind) !== "memory") return;
    let panel = null;
    const open = button("Change this line", () => {
      if (panel) panel.remove();
      panel = panel ? null : changePanel(trace, place);
      open.ariaExpanded = String(Boolean(panel));
      if (!panel) return;
      container.append(panel);
      panel.querySelector("textarea").focus();
    });
    open.ariaExpanded = "false";
    open.ariaLabel = `Change this line: ${line.text}`;
    const item = container.closest("li");
    let below = item.querySelector(":scope > .below");
    if (!below) item.insertBefore((below = make("span", "below")), item.querySelector(".room"));
    below.classList.add("tools");
    below.append(open);
  }

  function changePanel(trace, place) {
    const line = { ...trace.lines[place], p: null, fact: null, given: true };
    const [label, text] = field("textarea", "This memory line, as it shall be", line.text, 2);
    const offers = make("div", "offers");
    const told = status();
    const result = make("div", "result");
    text.maxLength = 1000;
    text.addEventListener("input", () => {
      line.source = "";
    });
    const run = async () => {
      line.text = text.value.trim();
      go.disabled = true;
      await rerun(trace, place, { ...line }, result, told);
      go.disabled = false;
    };
    const go = button("Run from here", run, "main");
    onEnter(text, () => go.click());
    const take = (taken, source) => {
      text.value = taken;
      line.source = source;
      text.focus();
    };
    offer(trace, line, offers, take).catch((error) => tell(told, `No lines are offered: ${error.message}`, true));
    return make("div", "change", label, text, offers, make("div", "buttons", go, told), result);
  }

  // The gold lines of this question, and what a search finds for the line, where there are such.
  async function offer(trace, line, offers, take) {
    const body = { question: trace.question, choices: trace.choices || [], line: line.text };
    const found = await (await post("/facts", body)).json();
    const others = found.retrieved.filter((one) => !found.gold.includes(one.text));
    const all = [...found.gold.map((text) => ["gold", text, ""]), ...others.map((one) => ["found", one.text, one.id])];
    offers.replaceChildren(
      ...all
        .filter(([, text]) => text !== line.text)
        .map(([name, text, source]) => {
          const made = button("", () => take(text, source));
          made.append(make("b", "", name), ` ${text}`);
          return made;
        }),
    );
  }

  async function rerun(trace, place, line, result, told) {
    const above = [...trace.lines.slice(0, place), line];
    const before = make("ol", "lines");
    const after = make("ol", "lines");
    drawTail(before, trace, place);
    const column = (name, lines) => make("div", name.toLowerCase(), make("h4", "", name), lines);
    result.replaceChildren(make("div", "tails", column("Before", before), column("After", after)));
    const known = new Set(trace.lines.slice(place).map((old) => old.text));
    const behind = (now) => now.lines.slice(above.length).map((one) => ({ ...one, differs: !known.has(one.text) }));
    const given = (now) => ({ ...now, lines: [...above, ...behind(now)] });
    drawTail(after, { ...trace, lines: above, prediction: "", done: false }, place);
    tell(told, "writing …");
    try {
      const now = given(await stream("/continue", sent(trace, above), undefined, (so) => drawTail(after, given(so), place)));
      now.gold = now.gold || trace.gold;
      drawTail(after, now, place);
      const [old, fresh] = [trace, now].map((one) => one.prediction || "none");
      tell(told, old === fresh ? `the answer stays ${fresh}` : `${old} → ${fresh}`);
      result.append(keepForm(now));
    } catch (error) {
      after.classList.remove("writing");
      tell(told, `Not answered: ${error.message}`, true);
    }
  }

  function keepForm(trace) {
    const [label, answer] = field("input", "Answer to learn", trace.gold || trace.prediction);
    const told = status();
    const keep = button("Keep this correction", async () => {
      keep.disabled = true;
      try {
        const body = { ...sent(trace, trace.lines), answer: answer.value.trim() };
        const kept = await (await post("/corrections", body)).json();
        tell(told, `kept in ${kept.kept}`);
      } catch (error) {
        keep.disabled = false;
        tell(told, `Not kept: ${error.message}`, true);
      }
    });
    answer.maxLength = 500;
    label.append(answer);
    return make("div", "keep", label, keep, told);
  }

  window.memreasonLive = tools; // the page calls it for each line of a trace that is opened
  const main = document.querySelector("main");
  main.insertBefore(askBox(), main.querySelector(".cards, section"));
})();
