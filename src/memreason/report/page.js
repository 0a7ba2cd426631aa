"use strict";
// The trace explorer. All texts are set as text, never as markup.
//
// The hook of the live page: where the embedded JSON has "live": true, window.memreasonLive(trace, index, container) is
// called once for each line of a trace that is opened, when the line stands in the page. `trace` holds the question's
// fields and those of what the run made of it (id, task, question, choices, gold, lines, prediction, verdict, ...),
// `index` is the line's place in trace.lines, `container` an empty div in the line's own element: buttons may be added
// to it, and whatever they open may stand behind it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const [list, rows, panes, pane, form, search] = ["list", "rows", "panes", "trace", "filters", "q"].map(find);
  const ROW = 66; // pixels; --row in page.css
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const VERDICTS = { correct: "✓ right", wrong: "✗ wrong", no_answer: "– no answer" };
  const several = data.runs.length > 1;
  const state = {}; // what the hash holds: id, q, sort, sure, run, and a value for each filter
  const haystacks = new Map(); // row -> all that is searched, in small letters
  let shown = []; // rows that pass, in order

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  const made = (row) => row.of.filter((one, place) => one && (!state.run || data.runs[place] === state.run));
  const least = (row) => Math.min(...made(row).map((one) => one.p ?? 2));
  const texts = (one) => one.lines.map((line) => line.text).join("\n");

  function facts(one) {
    const known = one.lines.map((line) => line.fact).filter((fact) => typeof fact === "boolean");
    return [known.includes(false) ? "one is false" : known.length ? "all are true" : "not checkable"];
  }

  function between(row) {
    const [first, ...others] = row.of;
    if (!first || others.includes(null)) return ["not in all"];
    const differs = (read) => others.some((other) => read(other) !== read(first));
    const found = [];
    if (differs((one) => one.verdict)) found.push("verdicts differ");
    if (differs((one) => one.extracted)) found.push("answers differ");
    if (differs(texts)) found.push("lines differ");
    return found.length ? ["differs", ...found] : ["the same"];
  }

  // name in the hash -> label, and the values that a trace (of a row) has
  const FILTERS = {
    verdict: ["Verdict", (one) => [one.verdict]],
    fault: ["Fault", (one) => [one.fault]],
    fact: ["Memory lines", facts],
    task: ["Task", (one, row) => [row.task]],
    form: ["Form", (one, row) => [row.form]],
    differs: ["Between runs", (one, row) => (several ? between(row) : [])],
  };
  const SORTS = {
    "": ["as asked", () => 0],
    unsure: ["least sure first", (a, b) => least(a) - least(b)],
    sure: ["surest first", (a, b) => least(b) - least(a)],
    question: ["question, A to Z", (a, b) => a.question.localeCompare(b.question)],
  };

  function haystack(row) {
    if (!haystacks.has(row)) {
      const said = (one) => [texts(one), one.prediction, one.fault, ...one.memory, ...one.reason, ...one.defects];
      const all = [row.question, ...row.choices, row.gold, row.id, ...row.of.filter(Boolean).flatMap(said)];
      haystacks.set(row, all.join("\n").toLowerCase());
    }
    return haystacks.get(row);
  }

  const count = (some) => some.length.toLocaleString("en");
  const words = () => (state.q || "").toLowerCase().split(/\s+/).filter(Boolean);

  function passes(row, wanted) {
    if (!wanted.every((word) => haystack(row).includes(word))) return false;
    const filters = Object.entries(FILTERS).filter(([name]) => state[name]);
    const sure = state.sure ? Number(state.sure) / 100 : null;
    return made(row).some(
      (one) =>
        (sure === null || (one.p !== null && one.p <= sure)) &&
        filters.every(([name, [, values]]) => values(one, row).includes(state[name])),
    );
  }

  // --- controls

  function counted(values) {
    const counts = new Map();
    for (const row of data.traces) {
      const own = new Set(row.of.filter(Boolean).flatMap((one) => values(one, row)));
      for (const value of own) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    }
    return counts;
  }

  function choice(name, label, options) {
    const select = make("select", { id: name }, options.map(([value, text]) => make("option", { value }, text)));
    select.addEventListener("change", () => change({ [name]: select.value }));
    form.append(make("label", {}, label, select));
  }

  function controls() {
    for (const [name, [label, values]] of Object.entries(FILTERS)) {
      const counts = [...counted(values)].sort(([a], [b]) => (a < b ? -1 : 1));
      const told = ([value, n]) => [value, `${value.replace("_", " ")} (${n.toLocaleString("en")})`];
      if (counts.length > 1) choice(name, label, [["", "any"], ...counts.map(told)]);
    }
    if (several) choice("run", "Filter by", [["", "any run"], ...data.runs.map((name) => [name, name])]);
    const range = make("input", { id: "sure", type: "range", min: 0, max: 100, value: 100 });
    range.addEventListener("input", () => change({ sure: range.value === "100" ? "" : range.value }));
    form.append(make("label", {}, make("span", { id: "sure-said" }), range));
    choice("sort", "Sort", Object.entries(SORTS).map(([value, [text]]) => [value, text]));
    const clear = make("button", { id: "clear", type: "button" }, "Clear");
    clear.addEventListener("click", () => change(Object.fromEntries(active().map((name) => [name, ""]))));
    form.append(clear);
    search.addEventListener("input", () => change({ q: search.value }));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  const active = () => Object.keys(state).filter((name) => name !== "id" && state[name]);

  function reflect() {
    search.value = state.q || "";
    for (const select of form.querySelectorAll("select")) select.value = state[select.id] || "";
    find("sure").value = state.sure || "100";
    find("sure-said").textContent = `Least sure line: ${state.sure ? `≤ ${(state.sure / 100).toFixed(2)}` : "any"}`;
    find("clear").disabled = !active().length;
  }

  // --- state and hash

  function change(values) {
    Object.assign(state, values);
    apply();
    remember();
  }

  function remember() {
    const held = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
    history.replaceState(null, "", held.size ? `#${held}` : location.pathname + location.search);
  }

  function recall() {
    if (!location.hash.includes("=")) return false; // an anchor of a section
    for (const name of Object.keys(state)) delete state[name];
    Object.assign(state, Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
    apply();
    find("explorer").scrollIntoView();
    return true;
  }

  function apply() {
    const wanted = words();
    shown = data.traces.filter((row) => passes(row, wanted)).sort((SORTS[state.sort] || SORTS[""])[1]);
    const wrong = shown.filter((row) => made(row).some((one) => one.verdict !== "correct"));
    find("count").textContent = `${count(shown)} of ${count(data.traces)} traces, ${count(wrong)} of them not right`;
    reflect();
    list.scrollTop = 0;
    open(data.traces.find((row) => row.id === state.id));
  }

  // --- the list: only rows in sight are in the page

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const seen = shown.slice(first, first + Math.ceil((list.clientHeight || 800) / ROW) + 12);
    rows.style.height = `${shown.length * ROW}px`;
    rows.replaceChildren(...seen.map((row, place) => option(row, first + place)));
    if (!shown.length) rows.append(make("p", { class: "empty" }, "No trace fits."));
    const current = rows.querySelector("[aria-selected=true]");
    if (current) list.setAttribute("aria-activedescendant", current.id);
    else list.removeAttribute("aria-activedescendant");
  }

  function option(row, place) {
    const about = { class: "option", role: "option", id: `row-${place}`, "aria-selected": row.id === state.id };
    Object.assign(about, { "aria-posinset": place + 1, "aria-setsize": shown.length });
    const under = row.of.map((one, run) => {
      const name = several ? `${data.runs[run]} ` : "";
      if (!one) return make("span", {}, `${name}–`);
      const said = VERDICTS[one.verdict];
      return make("span", {}, name, make("span", { class: one.verdict }, several ? said[0] : said));
    });
    const one = made(row)[0] || row.of.find(Boolean);
    if (!several && one.fault && one.fault !== "right") under.push(make("span", {}, one.fault));
    if (row.form) under.push(make("span", {}, row.form));
    const shape = one.lines.map((line) => make("i", { class: line.fact === false ? "false" : tone(line.kind) }));
    under.push(make("span", { class: "shape", "aria-hidden": "true" }, shape));
    if (one.p !== null) {
      const doubt = one.p < data.unsure[row.of.indexOf(one)];
      under.push(make("span", { class: doubt ? "doubt" : "" }, one.p.toFixed(2)));
    }
    const asked = make("span", { class: "asked" }, marked(row.question));
    const element = make("div", about, asked, make("span", { class: "under" }, under));
    element.style.top = `${place * ROW}px`;
    element.addEventListener("click", () => choose(row));
    return element;
  }

  const tone = (kind) => ["memory", "reason"].find((name) => kind.split("+")[0] === name) || "line";

  function marked(text) {
    const wanted = words().map((word) => word.replace(/[.*+?^$()|[\]\\{}]/g, "\\$&"));
    if (!wanted.length) return [text];
    const parts = text.split(new RegExp(`(${wanted.join("|")})`, "gi"));
    return parts.map((part, place) => (place % 2 ? make("mark", {}, part) : part));
  }

  // --- one trace

  function choose(row) {
    state.id = row ? row.id : "";
    open(row);
    remember();
    const narrow = window.matchMedia("(max-width: 52rem)").matches; // then list and trace take turns, as in page.css
    if (row && narrow) panes.scrollIntoView();
  }

  function open(row) {
    panes.classList.toggle("open", Boolean(row));
    const place = shown.indexOf(row);
    if (place >= 0) {
      const low = place * ROW - list.clientHeight + ROW;
      list.scrollTop = Math.min(place * ROW, Math.max(low, list.scrollTop));
    }
    draw();
    const hint = "Choose a trace to read it. j and k go through them, ? tells all keys.";
    pane.replaceChildren(...(row ? opened(row, place) : [make("p", { class: "empty" }, hint)]));
    pane.scrollTop = 0;
    if (row && data.live) live(row);
  }

  function live(row) {
    const one = row.of.find(Boolean);
    pane.querySelectorAll(".room").forEach((room, index) => window.memreasonLive({ ...row, ...one }, index, room));
  }

  function tools(row, place) {
    const button = (id, sign, name, act) => {
      const element = make("button", { id, type: "button", "aria-label": name }, sign, make("span", {}, ` ${name}`));
      element.addEventListener("click", act);
      return element;
    };
    const back = button("back", "←", "List", () => choose(null));
    const steps = [button("previous", "↑", "Previous", () => move(-1)), button("next", "↓", "Next", () => move(1))];
    const where = place >= 0 ? `${(place + 1).toLocaleString("en")} of ${count(shown)}` : "not among those shown";
    const link = make("a", { class: "link", href: `#id=${encodeURIComponent(row.id)}` }, "Link");
    return make("div", { class: "bar-of" }, back, steps, make("span", {}, where), link);
  }

  function opened(row, place) {
    const about = [`${row.task}${row.split ? ` / ${row.split}` : ""}`, row.form, row.id].filter(Boolean).join(" · ");
    const choices = row.choices.map((text, place) => {
      const gold = LETTERS[place] === row.gold;
      return make("li", { class: gold ? "gold" : "" }, `${LETTERS[place]}. `, marked(text), gold ? " (gold)" : "");
    });
    return [
      tools(row, place),
      make("h3", {}, marked(row.question)),
      make("p", { class: "note" }, about),
      choices.length ? make("ol", { class: "choices" }, choices) : "",
      make("div", { class: "sides" }, row.of.map((one, run) => side(row, one, run))),
    ];
  }

  function side(row, one, run) {
    const name = several ? make("h4", {}, data.runs[run]) : "";
    if (!one) return make("article", {}, name, make("p", { class: "note" }, "This run was not asked."));
    const others = row.of.filter((other) => other && other !== one);
    const lacks = (text) => others.some((other) => !other.lines.some((line) => line.text === text));
    const lines = one.lines.map((line) => step(line, lacks(line.text), data.unsure[run]));
    lines.push(last(one.prediction));
    const list = make("ol", { class: "lines" }, lines);
    return make("article", {}, name, verdict(row, one), list, evidence(one), anew(one));
  }

  function verdict(row, one) {
    const fault = one.fault === "right" ? "no fault" : `fault: ${one.fault}`;
    const read = one.extracted === null ? "nothing read" : ["read ", make("b", {}, one.extracted)];
    return make(
      "p",
      { class: "verdict" },
      make("span", { class: one.verdict }, VERDICTS[one.verdict]),
      one.fault ? make("span", { class: `chip ${tone(one.fault)}` }, fault) : "",
      make("span", {}, read, ", gold ", make("b", {}, row.gold)),
      make("span", { class: "note" }, `rule: ${one.rule}`),
    );
  }

  function last(prediction) {
    const said = make("span", { class: "said" }, marked(prediction || "(none)"));
    return make("li", { class: "step answer" }, make("span", { class: "chip" }, "answer"), said);
  }

  const FACTS = { true: "✓ true", false: "✗ false", null: "not checkable" };

  function step(line, differs, unsure) {
    const doubt = line.p !== null && line.p < unsure;
    const below = [];
    if ("fact" in line) below.push(make("span", { class: String(line.fact) }, FACTS[line.fact]));
    if (doubt) below.push(make("span", { class: "doubt" }, "? unsure"));
    if (differs) below.push(make("span", {}, "≠ differs"));
    if (line.source) below.push(make("span", { class: "source" }, `retrieved: ${line.source}`));
    if (line.own) below.push(make("span", {}, `the model had: ${line.own}`));
    const figures = ["entropy", "margin"].filter((name) => typeof line[name] === "number");
    const said = figures.map((name) => `${name} ${line[name].toFixed(2)}`).join(", ");
    if (said) below.push(make("span", {}, said));
    const told = make("span", { class: "hidden" }, "probability ");
    return make(
      "li",
      { class: `step ${tone(line.kind)}${doubt ? " unsure" : ""}` },
      make("span", { class: `chip ${tone(line.kind)}` }, line.kind || "line"),
      make("span", { class: "said" }, marked(line.text)),
      line.p === null ? "" : make("span", { class: "sure" }, told, line.p.toFixed(2), meter(line.p)),
      below.length ? make("span", { class: "below" }, below) : "",
      data.live ? make("div", { class: "room" }) : "",
    );
  }

  function meter(share) {
    const element = make("i", { "aria-hidden": "true" });
    element.style.setProperty("--p", `${100 * share}%`);
    return element;
  }

  function evidence(one) {
    const found = [...one.memory.map((text) => ["memory", text]), ...one.reason.map((text) => ["reason", text])];
    found.push(...one.defects.map((text) => ["form", text]));
    if (Object.keys(one.ways).length > 1) {
      found.push(...Object.entries(one.ways).map(([way, said]) => [`${way} way`, said]));
    }
    if (!found.length) return "";
    const items = found.map(([kind, text]) => make("li", {}, make("b", {}, `${kind}: `), marked(text)));
    return make("div", { class: "evidence" }, make("b", {}, "Evidence"), make("ul", {}, items));
  }

  // What became of a wrong answer with the gold memory lines in place of its own.
  function anew(one) {
    if (!one.tried) return "";
    const line = (step, where) => {
      const kind = step.kinds.join("+");
      const chip = make("span", { class: `chip ${tone(kind)}` }, kind || "line");
      const below = make("span", { class: "below" }, where);
      const said = make("span", { class: "said" }, marked(step.text));
      return make("li", { class: `step ${tone(kind)}` }, chip, said, below);
    };
    const lines = one.tried.given.map((step) => line(step, "given"));
    lines.push(...one.tried.steps.map((step) => line(step, "generated behind it")), last(one.tried.answer));
    const list = make("ol", { class: "lines" }, lines);
    return make("details", {}, make("summary", {}, "Anew, with gold memory lines"), list);
  }

  // --- keys and colours

  function move(by) {
    const place = shown.findIndex((row) => row.id === state.id);
    const next = shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))];
    if (next) choose(next);
  }

  const page = () => Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const far = data.traces.length;
  const IN_LIST = { ArrowDown: () => 1, ArrowUp: () => -1, PageDown: page, PageUp: () => -page() };
  Object.assign(IN_LIST, { Home: () => -far, End: () => far });
  const ANYWHERE = {
    j: () => move(1),
    k: () => move(-1),
    "?": () => find("help").showModal(),
    "/": () => search.focus(),
    Escape: () => (state.id ? (choose(null), list.focus()) : change({ q: "" })),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
    const typing = event.target.matches("input[type=search], input[type=text], textarea, select");
    let act = typing ? null : ANYWHERE[event.key];
    if (event.target === list && event.key in IN_LIST) act = () => move(IN_LIST[event.key]());
    if (event.target === list && event.key === "Enter") act = () => pane.focus();
    if (event.target === search && event.key === "Enter") act = () => list.focus();
    if (event.target === search && event.key === "Escape" && !search.value) act = () => list.focus();
    if (!act) return;
    event.preventDefault();
    act();
  });

  // A browser may keep nothing for pages opened from files; then the choice holds for this page only.
  function kept(act) {
    try {
      return act(localStorage) || "";
    } catch (error) {
      return "";
    }
  }

  function colours() {
    const [select, root] = [find("theme"), document.documentElement];
    const wear = () => {
      if (select.value) root.setAttribute("data-theme", select.value);
      else root.removeAttribute("data-theme");
    };
    select.value = kept((store) => store.getItem("memreason-theme"));
    wear();
    select.addEventListener("change", () => {
      wear();
      kept((store) => store.setItem("memreason-theme", select.value));
    });
  }

  colours();
  controls();
  find("keys").addEventListener("click", () => find("help").showModal());
  list.addEventListener("scroll", () => requestAnimationFrame(draw));
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", recall);
  if (!recall()) apply();
  performance.mark("memreason-ready");
})();
