// Draws the sliders in the Steering tab and their strip in the Chat tab, and sends what the user does. See pages.py.
(() => {
  if (window.steering) return;
  const RESEND = 2500, POLL = 4000, POLL_BUSY = 1000;
  const page = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
  let run = "", number = -1, state = null;
  let count = 0, wishes = [], sent = 0, saidUpTo = 0;
  let held = null; // the slider that is being dragged
  const chosen = new Set(), open = new Set(), told = {};
  let traitsSeen = false;

  // ---- to the server and back ----

  const box = () => document.querySelector("#steering-send textarea, #steering-send input");
  function send() {
    const at = box();
    if (!at) return;
    sent = Date.now();
    at.value = JSON.stringify({ page, wishes, at: sent });
    at.dispatchEvent(new Event("input", { bubbles: true }));
  }
  function wish(what) {
    // of several moves of one slider that have not been sent on, the last one is what is wished
    const last = wishes[wishes.length - 1];
    if (last && what.do === "move" && last.do === "move" && last.key === what.key) wishes.pop();
    wishes.push({ n: ++count, ...what });
    delete told[what.do];
    send();
  }
  function take(text) {
    let news;
    try { news = JSON.parse(text); } catch { return; }
    if (news.page !== page) { if (!state) send(); return; }
    if (news.run === run && news.number <= number) return; // older than what is shown
    run = news.run; number = news.number; state = news;
    wishes = wishes.filter((one) => one.n > news.arrived);
    for (const one of news.said) {
      if (one.n <= saidUpTo) continue;
      told[one.at] = one;
      if (one.at === "write" && one.bad) mark(one);
    }
    if (news.said.length) saidUpTo = Math.max(saidUpTo, news.said[news.said.length - 1].n);
    draw();
  }
  setInterval(() => {
    if (document.hidden) return;
    const since = Date.now() - sent;
    if (wishes.length ? since > RESEND : since > (state && state.busy ? POLL_BUSY : POLL)) send();
  }, 500);
  for (const event of ["focus", "visibilitychange"]) addEventListener(event, () => document.hidden || send());

  // ---- small parts ----

  function make(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key in node && key !== "list") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }
  const button = (text, title, click, more = {}) => make("button", { type: "button", textContent: text, title, onclick: click, ...more });
  function set(node, key, value) { if (node[key] !== value) node[key] = value; }
  const shown = (node, yes) => { node.hidden = !yes; };
  function choices(select, names, first) {
    const want = [first, ...names].join("\n");
    if (select.dataset.names === want) return;
    const kept = select.value;
    select.dataset.names = want;
    select.replaceChildren(...(first === null ? [] : [make("option", { value: "", textContent: first })]),
      ...names.map((name) => make("option", { value: name, textContent: name })));
    if (names.includes(kept)) select.value = kept;
  }
  function note(node, ...deeds) {
    const one = deeds.map((deed) => told[deed]).filter(Boolean).sort((a, b) => b.n - a.n)[0];
    shown(node, !!one);
    if (!one) return;
    node.className = one.bad ? "steer-note bad" : "steer-note";
    set(node, "textContent", one.text);
  }

  // ---- the page's parts ----

  let parts = null;
  function build(root) {
    const p = { root, rows: new Map() };
    p.status = make("div", { id: "steering-status" });
    p.on = make("input", { type: "checkbox", id: "steering-on", onchange: () => wish({ do: "on", value: p.on.checked }) });
    p.zero = button("All to 0", "set every slider to 0", () => wish({ do: "zero" }), { id: "steering-zero" });
    p.list = make("div", { id: "steering-rows" });
    p.rowNote = make("div", { role: "alert" });
    p.choice = make("select", { id: "steering-choice", "aria-label": "Add a vector" });
    p.add = button("Add", "a slider for this vector", () => { wish({ do: "add", name: p.choice.value }); p.choice.value = ""; }, { id: "steering-add" });
    p.addRow = make("div", { className: "steer-line" }, p.choice, p.add);
    p.addNote = make("div", { role: "alert" });
    // expression
    p.text = make("textarea", { rows: 1, spellcheck: false, "aria-label": "Expression", placeholder: "mood:0.6 + succinctness:-0.3@10-20?response" });
    p.text.addEventListener("input", dirty);
    p.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter") { event.preventDefault(); wish({ do: "write", text: p.text.value.trim() }); p.pending = count; }
      if (event.key === "Escape") { p.dirty = false; delete told.write; draw(); }
    });
    p.apply = button("Apply", "put this expression in force (Enter)", () => { wish({ do: "write", text: p.text.value.trim() }); p.pending = count; }, { id: "steering-apply" });
    p.undo = button("Undo", "back to what acts (Esc)", () => { p.dirty = false; delete told.write; draw(); });
    p.textNote = make("div", { role: "alert", id: "steering-note" });
    p.problems = make("div", { id: "steering-problems" });
    p.expression = make("div", { className: "steer-part", id: "steering-expression" },
      make("h4", { textContent: "Expression" , title: "the same sliders as text, for the API and the command line" }),
      make("div", { className: "steer-line" }, p.text, p.apply, p.undo), p.textNote);
    // presets
    p.preset = make("select", { id: "steering-preset", "aria-label": "Preset", onchange: () => p.preset.value && wish({ do: "load", name: p.preset.value }) });
    p.presetName = make("input", { type: "text", maxLength: 64, placeholder: "name of the preset", id: "steering-preset-name", "aria-label": "Name of the preset" });
    p.save = button("Save", "keep the sliders under this name", () => { wish({ do: "save", name: p.presetName.value.trim() || (state && state.loaded) || "" }); p.presetName.value = ""; }, { id: "steering-save-preset" });
    p.forget = button("Delete", "delete the preset that is loaded", () => wish({ do: "forget", name: p.preset.value }), { id: "steering-delete-preset" });
    p.presetState = make("span", { className: "steer-quiet", id: "steering-preset-state" });
    p.bind = make("input", { type: "checkbox", id: "steering-character", onchange: () => wish({ do: "bind", value: p.bind.checked }) });
    p.bindText = make("span");
    p.bindLabel = make("label", { className: "steer-check" }, p.bind, p.bindText);
    p.presetNote = make("div", { role: "status", id: "steering-preset-note" });
    p.presets = make("div", { className: "steer-part" }, make("h4", { textContent: "Presets" }),
      make("div", { className: "steer-line" }, p.preset, p.presetState, p.forget),
      make("div", { className: "steer-line" }, p.presetName, p.save), p.bindLabel, p.presetNote);
    // traits
    p.traitsHead = make("h4");
    p.traitsText = make("p", { className: "steer-quiet" });
    p.traits = make("div", { id: "steering-traits" });
    p.fit = button("Fit", "fit what is ticked on the loaded model", () => wish({ do: "fit", names: [...chosen] }), { id: "steering-fit", className: "steer-main" });
    p.cancel = button("Cancel", "stop fitting", () => { set(p.cancel, "textContent", "Stopping…"); set(p.cancel, "disabled", true); wish({ do: "cancel" }); }, { id: "steering-cancel" });
    p.imitate = button("", "strength 1 does what its description does, without it in the prompt", () => wish({ do: "imitate" }), { id: "steering-imitate" });
    p.fitNote = make("div", { role: "alert", id: "steering-fit-note" });
    p.progress = make("div", { id: "steering-progress", "aria-live": "polite" });
    p.card = make("div", { className: "steer-part", id: "steering-card" }, p.traitsHead, p.traitsText, p.traits,
      make("div", { className: "steer-line" }, p.fit, p.imitate, p.cancel), p.fitNote, p.progress);
    p.sliders = make("div", { className: "steer-part" },
      make("div", { className: "steer-line" }, make("h4", { textContent: "Sliders" }), p.zero,
        make("label", { className: "steer-check", title: "the switch for everything" }, p.on, "Steering on")),
      p.list, p.rowNote, p.problems, p.addRow, p.addNote);
    p.left = make("div", { className: "steer-column" }, p.sliders, p.expression);
    p.right = make("div", { className: "steer-column" }, p.presets, p.card);
    root.replaceChildren(p.status, make("div", { className: "steer-columns" }, p.left, p.right));
    return p;
  }
  function dirty() {
    parts.dirty = !!state && parts.text.value.trim() !== state.text;
    delete told.write;
    draw();
  }
  function mark(one) {
    if (!parts || !one.character) return;
    const at = Math.min(one.character - 1, parts.text.value.length);
    if (document.activeElement === parts.text) parts.text.setSelectionRange(at, Math.min(at + 1, parts.text.value.length));
  }

  // ---- a slider ----

  const SCOPES = [["", "as the vector says"], ["response", "the reply"], ["prompt", "the prompt"], ["all", "prompt and reply"], ["thinking", "the thinking"], ["answer", "the answer after thinking"]];
  const OPS = [["", "as the vector says"], ["add", "push"], ["project", "remove"], ["clamp", "hold at"], ["renorm", "push, keep length"]];
  const words = (pairs, value) => (pairs.find((pair) => pair[0] === value) || [, value])[1];
  function row(key) {
    const r = { key };
    r.name = make("span", { className: "steer-name" });
    r.tag = make("span", { className: "steer-tag" });
    r.low = make("span", { className: "steer-pole low" });
    r.high = make("span", { className: "steer-pole high" });
    const move = (value, final) => {
      if (!Number.isFinite(value)) return;
      r.shown = value;
      paint(r);
      if (final) wish({ do: "move", key, value });
      else { clearTimeout(r.timer); r.timer = setTimeout(() => wish({ do: "move", key, value: r.shown }), 120); }
    };
    r.range = make("input", { type: "range", min: -1, max: 1, step: 0.05 });
    r.range.addEventListener("input", () => { held = key; r.number.value = String(Number(r.range.value)); move(Number(r.range.value), false); });
    const done = () => { if (held === key) { held = null; clearTimeout(r.timer); wish({ do: "move", key, value: Number(r.range.value) }); } };
    r.range.addEventListener("change", done);
    r.range.addEventListener("pointerup", done);
    r.range.addEventListener("blur", done);
    r.number = make("input", { type: "number", step: 0.05 });
    r.number.addEventListener("change", () => { r.editing = false; if (r.number.value !== "") move(Number(r.number.value), true); else draw(); });
    r.number.addEventListener("input", () => { r.editing = true; });
    r.number.addEventListener("blur", () => { r.editing = false; });
    r.zero = button("0", "set to 0", () => { r.range.value = r.number.value = "0"; move(0, true); }, { className: "steer-zero" });
    r.drop = button("✕", "remove this slider; the vector stays", () => wish({ do: "drop", key }), { className: "steer-drop" });
    r.more = button("⋯", "layers, what it does, what it acts on", () => { open.has(key) ? open.delete(key) : open.add(key); r.filled = false; draw(); });
    r.layers = make("input", { type: "text", placeholder: "all" });
    r.op = make("select"); r.scope = make("select");
    r.op.replaceChildren(...OPS.map(([value, text]) => make("option", { value, textContent: text })));
    r.scope.replaceChildren(...SCOPES.map(([value, text]) => make("option", { value, textContent: text })));
    r.has = make("span", { className: "steer-quiet" });
    r.erase = button("Delete the vector", "delete its file from the library", () => {
      if (r.erase.dataset.sure) { delete r.erase.dataset.sure; wish({ do: "delete", name: r.vector }); }
      else { r.erase.dataset.sure = "1"; r.erase.textContent = "Delete it for good"; setTimeout(() => { delete r.erase.dataset.sure; r.erase.textContent = "Delete the vector"; }, 4000); }
    });
    r.details = make("div", { className: "steer-details" },
      make("label", { title: "such as 10-20; empty: all that the vector has" }, "layers ", r.layers),
      make("label", { title: "push: add; remove: project it out; hold at: clamp; push, keep length: renorm" }, "does ", r.op),
      make("label", { title: "the scope" }, "acts on ", r.scope),
      r.calibrate = button("Calibrate", "find the strength at which 1 holds; takes minutes", () => wish({ do: "fit", names: [r.vector] })),
      button("Apply", "", () => wish({ do: "shape", key, layers: r.layers.value, op: r.op.value, scope: r.scope.value })), r.erase, r.has);
    r.track = make("div", { className: "steer-track" }, r.range);
    r.node = make("div", { className: "steer-row" }, make("div", { className: "steer-head" }, r.name, r.tag),
      make("div", { className: "steer-scale" }, r.low, r.track, r.high),
      make("div", { className: "steer-ends" }, r.number, r.zero, r.more, r.drop), r.details);
    return r;
  }
  function paint(r) {
    const min = Number(r.range.min), max = Number(r.range.max), span = max - min || 1;
    const at = (value) => (100 * (value - min)) / span;
    const value = Math.min(max, Math.max(min, r.shown));
    r.track.style.setProperty("--from", `${Math.min(at(0), at(value))}%`);
    r.track.style.setProperty("--to", `${Math.max(at(0), at(value))}%`);
    r.track.style.setProperty("--zero", `${at(0)}%`);
    r.node.classList.toggle("beyond", Math.abs(r.shown) > 1);
  }
  function fill(r, term) {
    r.vector = term.name;
    const waiting = wishes.some((one) => one.key === term.key && one.do === "move") || held === term.key;
    set(r.name, "textContent", term.name);
    set(r.low, "textContent", term.removes ? "0 off" : term.poles ? term.poles[0] : "−");
    set(r.high, "textContent", term.removes ? "1 removed" : term.poles ? term.poles[1] : "+");
    const beyond = Math.abs(term.value) > 1 ? "beyond the calibrated strength" : "";
    const span = term.layers && `layers ${term.layers}`, acts = term.scope && `acts on ${words(SCOPES, term.scope)}`, does = term.op && words(OPS, term.op);
    const tag = [term.missing ? "no vector for this model" : "", term.provisional ? "provisional" : "", beyond, span, does, acts].filter(Boolean).join(" · ");
    set(r.tag, "textContent", tag);
    set(r.tag, "title", term.provisional ? "not calibrated: strength 1 is a guess" : beyond);
    if (!waiting) {
      set(r.range, "min", String(-term.reach)); set(r.range, "max", String(term.reach));
      if (!r.editing) { set(r.range, "value", String(term.value)); set(r.number, "value", String(term.value)); r.shown = term.value; }
    }
    paint(r);
    const label = term.poles ? `${term.name}: ${term.poles[0]} to ${term.poles[1]}` : term.name;
    if (r.range.getAttribute("aria-label") !== label) { r.range.setAttribute("aria-label", label); r.number.setAttribute("aria-label", `strength of ${term.name}`); }
    shown(r.calibrate, term.provisional && term.trait && !state.busy);
    shown(r.details, open.has(term.key));
    if (open.has(term.key) && !r.filled) {
      r.filled = true;
      r.layers.value = term.layers;
      for (const [select, value] of [[r.op, term.op], [r.scope, term.scope]]) {
        if (![...select.options].some((option) => option.value === value)) select.append(make("option", { value, textContent: value }));
        select.value = value;
      }
    }
    set(r.has, "textContent", term.has ? `the vector has layers ${term.has}; by itself it ${words(OPS, term.own.op) === "push" ? "pushes" : words(OPS, term.own.op)}, on ${words(SCOPES, term.own.scope)}` : "");
  }

  // ---- drawing ----

  function draw() {
    const root = document.getElementById("steering-panel");
    if (!root || !state) return;
    if (!parts || parts.root !== root || !root.firstChild) parts = build(root);
    const p = parts, s = state;
    if (p.status.dataset.shown !== s.status) { p.status.innerHTML = s.status; p.status.dataset.shown = s.status; }
    const pending = (what) => wishes.some((one) => one.do === what);
    if (!pending("on")) set(p.on, "checked", s.on);
    const first = s.ready && !s.names.length;
    p.root.classList.toggle("first", first);
    shown(p.left, !first || s.terms.length > 0); shown(p.presets, !first || s.presets.length > 0);
    shown(p.zero, s.terms.length > 1);
    // sliders
    const keys = s.terms.map((term) => term.key);
    for (const [key, r] of p.rows) if (!keys.includes(key)) { r.node.remove(); p.rows.delete(key); open.delete(key); if (held === key) held = null; }
    s.terms.forEach((term, i) => {
      let r = p.rows.get(term.key);
      if (!r) p.rows.set(term.key, (r = row(term.key)));
      if (p.list.children[i] !== r.node) p.list.insertBefore(r.node, p.list.children[i] || null);
      r.node.id = `steering-slider-${i}`;
      fill(r, term);
    });
    if (!s.terms.length && !p.none) p.list.append((p.none = make("p", { className: "steer-quiet", textContent: "No sliders yet: add a vector, or fit a trait." })));
    if (s.terms.length && p.none) { p.none.remove(); p.none = null; }
    note(p.rowNote, "move", "drop", "shape", "delete", "on", "zero");
    const there = s.terms.map((term) => term.name);
    choices(p.choice, s.names.filter((name) => !there.includes(name)), "add a vector…");
    shown(p.addRow, s.names.some((name) => !there.includes(name)));
    note(p.addNote, "add");
    const wrong = s.note.map((text) => `${text}`).join("\n");
    if (p.problems.dataset.shown !== wrong) {
      p.problems.dataset.shown = wrong;
      p.problems.replaceChildren(...s.note.map((text) => make("div", { className: "steer-note bad", textContent: text })));
      for (const term of s.terms) {
        if (term.missing && term.trait && term.value !== 0) p.problems.append(button(`Fit ${term.name}`, "fit it on the loaded model", () => wish({ do: "fit", names: [term.name] })));
      }
    }
    // expression
    if (p.pending && !wishes.some((one) => one.n === p.pending)) { p.pending = 0; if (!told.write) p.dirty = false; }
    if (!p.dirty && !p.pending) set(p.text, "value", s.text);
    p.text.style.height = "auto"; if (p.text.scrollHeight) p.text.style.height = `${p.text.scrollHeight + 2}px`;
    shown(p.apply, !!p.dirty); shown(p.undo, !!p.dirty);
    note(p.textNote, "write");
    // presets
    choices(p.preset, s.presets, s.presets.length ? "choose a preset…" : "no presets yet");
    if (!pending("load") && document.activeElement !== p.preset) set(p.preset, "value", s.loaded);
    set(p.presetState, "textContent", s.loaded ? (s.changed ? "changed" : "loaded") : "");
    shown(p.forget, !!s.loaded);
    set(p.presetName, "placeholder", s.loaded && s.changed ? `name; empty: replace ${s.loaded}` : "name of the preset");
    shown(p.bindLabel, !!s.character && !!s.loaded);
    set(p.bindText, "textContent", `Load ${s.loaded} with ${s.character}`);
    if (!pending("bind")) set(p.bind, "checked", !!s.loaded && s.bound === s.loaded);
    note(p.presetNote, "load", "save", "forget", "bind");
    // traits
    if (!traitsSeen && s.traits.length) { traitsSeen = true; if (!s.names.length) chosen.add((s.traits.find((one) => one.name === "mood") || s.traits[0]).name); }
    const left = s.traits.map((one) => one.name);
    for (const name of [...chosen]) if (!left.includes(name)) chosen.delete(name);
    const want = JSON.stringify(s.traits);
    if (p.traits.dataset.shown !== want) {
      p.traits.dataset.shown = want;
      p.traits.replaceChildren(...s.traits.map((one) => {
        const tick = make("input", { type: "checkbox", value: one.name, checked: chosen.has(one.name), onchange: () => { tick.checked ? chosen.add(one.name) : chosen.delete(one.name); draw(); } });
        return make("label", { className: "steer-check" }, tick, make("b", { textContent: one.name }), make("span", { className: "steer-quiet", textContent: `${one.negative} ↔ ${one.positive}` }));
      }));
    }
    set(p.traitsHead, "textContent", first ? "Fit your first slider" : "More sliders to fit on this model");
    set(p.traitsText, "textContent", first
      ? "A slider belongs to one model, so it is fitted on the one that is loaded. A provisional one is there as soon as the model has read its texts, the second of three steps; calibrating it goes on behind, for minutes. The chat goes on meanwhile, more slowly."
      : "These come with the package and have no vector for this model yet.");
    set(p.fit, "textContent", chosen.size > 1 ? `Fit ${chosen.size} sliders` : chosen.size ? `Fit ${[...chosen][0]}` : "Fit");
    set(p.fit, "disabled", !chosen.size);
    for (const node of [p.traitsHead, p.traitsText, p.traits, p.fit]) shown(node, s.traits.length > 0);
    shown(p.cancel, s.busy);
    if (s.busy && !s.stopping && !pending("cancel")) { set(p.cancel, "textContent", "Cancel"); set(p.cancel, "disabled", false); }
    if (p.progress.dataset.shown !== s.jobs) { p.progress.innerHTML = s.jobs; p.progress.dataset.shown = s.jobs; }
    shown(p.imitate, !!s.imitable && !s.names.includes(s.imitable) && !s.busy);
    set(p.imitate, "textContent", `Make a slider of ${s.imitable === "system-prompt" ? "the system message" : s.character || s.imitable}`);
    note(p.fitNote, "fit", "imitate", "cancel");
    shown(p.card, s.traits.length > 0 || !!s.jobs || !p.imitate.hidden);
    strip();
  }

  // ---- in the Chat tab ----

  let band = null;
  function strip() {
    const s = state, at = document.getElementById("chat-input-row");
    if (!at) return;
    if (!band || !band.node.isConnected) {
      band = { rows: new Map() };
      band.on = make("input", { type: "checkbox", onchange: () => wish({ do: "on", value: band.on.checked }) });
      band.list = make("div", { className: "steer-strip-rows" });
      band.preset = make("select", { "aria-label": "Preset", onchange: () => band.preset.value && wish({ do: "load", name: band.preset.value }) });
      band.again = button("Again", "regenerate the last reply with this steering", () => document.getElementById("Regenerate")?.click());
      band.first = button("", "fitted on the loaded model; the chat goes on meanwhile, more slowly", () => wish({ do: "fit", names: [band.trait] }), { id: "steering-first" });
      band.step = make("span", { className: "steer-quiet" });
      band.node = make("div", { id: "steering-strip" }, (band.switch = make("label", { className: "steer-check", title: "steering on or off" }, band.on, "Steering")), band.list, band.preset, band.again, band.first, band.step, (band.fell = make("div", { className: "steer-fell", role: "status" })));
      at.prepend(band.node); // above it, wherever the webui puts it
    }
    const trait = !s.names.length && (s.traits.find((one) => one.name === "mood") || s.traits[0]);
    shown(band.node, s.ready && (s.terms.length > 0 || s.busy || !!trait));
    for (const node of [band.switch, band.again]) shown(node, s.terms.length > 0);
    shown(band.first, !!trait && !s.busy && !s.terms.length);
    if (trait) { band.trait = trait.name; set(band.first, "textContent", `Fit a first slider: ${trait.negative} ↔ ${trait.positive}`); }
    shown(band.step, !!s.step); set(band.step, "textContent", s.step);
    if (!wishes.some((one) => one.do === "on")) set(band.on, "checked", s.on);
    const keys = s.terms.slice(0, 4).map((term) => term.key);
    for (const [key, r] of band.rows) if (!keys.includes(key)) { r.node.remove(); band.rows.delete(key); }
    s.terms.slice(0, 4).forEach((term, i) => {
      let r = band.rows.get(term.key);
      if (!r) {
        r = { range: make("input", { type: "range", step: 0.05 }), name: make("span"), value: make("output") };
        const key = term.key;
        r.range.addEventListener("input", () => { held = key; set(r.value, "textContent", r.range.value); });
        const done = () => { if (held === key) { held = null; wish({ do: "move", key, value: Number(r.range.value) }); } };
        for (const event of ["change", "pointerup", "blur"]) r.range.addEventListener(event, done);
        r.node = make("label", {}, r.name, r.range, r.value);
        band.rows.set(key, r);
      }
      if (band.list.children[i] !== r.node) band.list.insertBefore(r.node, band.list.children[i] || null);
      set(r.name, "textContent", term.name);
      r.node.title = term.poles ? `${term.poles[0]} ↔ ${term.poles[1]}` : term.name;
      if (held === term.key || wishes.some((one) => one.key === term.key && one.do === "move")) return;
      set(r.range, "min", String(-term.reach)); set(r.range, "max", String(term.reach));
      set(r.range, "value", String(term.value)); set(r.value, "textContent", String(term.value));
    });
    choices(band.preset, s.presets, "preset…");
    if (document.activeElement !== band.preset) set(band.preset, "value", s.loaded);
    shown(band.fell, !!s.fell); set(band.fell, "textContent", s.fell);
    shown(band.preset, s.presets.length > 0);
  }

  window.steering = { take, refresh: () => send(), get state() { return state; }, get waiting() { return wishes.length; } };
  const begin = setInterval(() => { if (box() && document.getElementById("steering-panel")) { if (state) { clearInterval(begin); draw(); } else send(); } }, 700);
})();
