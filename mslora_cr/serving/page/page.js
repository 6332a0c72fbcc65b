"use strict";
// Whatever comes from files, questions or the model becomes text, never markup: textContent only.
const at = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};
let run, upload = null, picked = null, shown = null, listing = 0, asked = 0, drawn = [];

async function get(path, options) {
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error || response.statusText);
  return content;
}

function tell(text, wrong) {
  at("status").textContent = text;
  at("status").className = wrong ? "error" : "";
}

function show(source, name) {
  if (shown) URL.revokeObjectURL(shown);
  shown = source.startsWith("blob:") ? source : null;
  at("picture").src = source;
  at("picture").alt = name;
  at("name").textContent = name;
  at("figure").hidden = false;
}

// An answer belongs to the picture and question it was given to: it is never shown beside others, nor below an error.
// What is still being answered is dropped when it comes.
function forget() {
  asked += 1;
  at("answers").replaceChildren();
  at("truth").hidden = true;
  at("truth").textContent = "";
  likely({});
  outline([]);
  tell("");
  at("ask").disabled = false;
}

// Boxes over the picture, in shares of its width and height: those of the question, the true one, and dashed what the
// last stage said.
function outline(boxes) {
  at("frame").querySelectorAll("i").forEach((old) => old.remove());
  for (const [kind, box] of [...drawn.map((box) => ["asked", box]), ...boxes]) {
    if (!box) continue;
    const mark = make("i", undefined, kind), inside = (share) => 100 * Math.min(1, Math.max(0, share));
    mark.style.left = `${inside(box[0])}%`;
    mark.style.top = `${inside(box[1])}%`;
    mark.style.width = `${Math.max(0, inside(box[2]) - inside(box[0]))}%`;
    mark.style.height = `${Math.max(0, inside(box[3]) - inside(box[1]))}%`;
    at("frame").append(mark);
  }
}

const MARK = "<box>";

// Where the pointer is on the picture, in shares of its width and height.
function place(event) {
  const around = at("picture").getBoundingClientRect(), inside = (share) => Math.min(1, Math.max(0, share));
  return [inside((event.clientX - around.left) / around.width), inside((event.clientY - around.top) / around.height)];
}

// A box drawn on the picture stands for the next mark in the question.
function draw(event) {
  if (event.button !== 0) return;
  event.preventDefault();
  const [x, y] = place(event);
  const spanned = (end) => { const [u, v] = place(end); return [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)]; };
  const move = (end) => outline([["asked", spanned(end)]]);
  document.addEventListener("pointermove", move);
  document.addEventListener("pointerup", (end) => {
    document.removeEventListener("pointermove", move);
    const box = spanned(end);
    forget();
    if ((box[2] - box[0]) * (box[3] - box[1]) < 1e-4) return;  // a click
    const question = at("question");
    if (question.value.split(MARK).length - 1 <= drawn.length) question.value = `${question.value.trimEnd()} ${MARK}`.trim();
    drawn.push(box);
    outline([]);
  }, { once: true });
}

async function take(file) {
  drawn = [];
  forget();
  upload = file;
  picked = null;
  show(URL.createObjectURL(file), file.name);
  const form = new FormData();
  form.append("image", file, "picture");  // its name stays here
  try {  // what the model will see: upright, and DICOM too
    const response = await fetch("api/preview", { method: "POST", body: form });
    if (!response.ok) throw new Error((await response.json()).error || response.statusText);
    const picture = await response.blob();
    if (upload === file) show(URL.createObjectURL(picture), file.name);
  } catch (error) {
    if (upload === file) tell(error.message, true);
  }
}

async function list() {
  const of = at("of").value, mine = ++listing;
  const query = new URLSearchParams({ task: of, search: at("search").value });
  try {
    const found = await get("api/questions?" + query);
    if (mine !== listing) return;  // a later search has been asked for
    at("questions").replaceChildren(...found.questions.map((row) => {
      const item = make("li"), button = make("button"), small = make("img");
      small.loading = "lazy";
      small.alt = "";
      small.src = "api/image?" + new URLSearchParams({ task: of, index: row.index, size: 48 });
      button.append(small, make("span", row.question));
      button.type = "button";
      button.addEventListener("click", () => {
        drawn = [];
        forget();
        upload = null;
        at("file").value = "";  // so that the same file can be chosen again
        picked = { of, index: row.index };
        at("question").value = row.question;
        show("api/image?" + new URLSearchParams({ task: of, index: row.index }), `${of}, question ${row.index + 1}`);
      });
      item.append(button);
      return item;
    }));
    at("count").textContent = `${found.questions.length} of ${found.all} questions`;
  } catch (error) {
    at("questions").replaceChildren();
    at("count").textContent = error.message;
  }
}

function stageName(stage) {
  return stage ? `after ${stage}: ${run.tasks[stage - 1]}` : "base model";
}

function card(answer) {
  const box = make("div", undefined, "answer");
  box.append(make("h2", stageName(answer.stage)));
  const abstained = answer.text === null;
  box.append(make("p", abstained ? "(no answer: the model is not sure enough)" : answer.text || "(no words)", "text"));
  if (answer.confidence !== null) {
    box.append(make("p", `probability of the answer ${(100 * answer.confidence).toFixed(1)} %`, "quiet"));
  }
  if (answer.foreign) box.append(make("p", "like none of the tasks", "quiet"));
  if (answer.score) {
    box.append(make("p", answer.score, "quiet score"));
    if (answer.score === "right" || answer.score === "wrong") box.classList.add(answer.score);
  }
  const banks = answer.banks.length ? `banks ${answer.banks.join(", ")}` : "no bank";
  box.append(make("p", answer.task ? `as ${answer.task}; ${banks}` : banks, "quiet"));
  return box;
}

function likely(probabilities) {
  const rows = Object.entries(probabilities).map(([task, share]) => {
    const row = make("div"), bar = make("meter");
    bar.value = share;
    row.append(bar, make("span", `${task} ${(100 * share).toFixed(1)} %`));
    return row;
  });
  at("probabilities").replaceChildren(...rows);
  at("router").hidden = rows.length === 0;
}

async function ask() {
  const form = new FormData();
  if (upload) form.append("image", upload, "picture");  // its name stays here
  else if (picked) { form.append("of", picked.of); form.append("index", picked.index); }
  form.append("question", at("question").value);
  form.append("boxes", JSON.stringify(drawn));
  form.append("task", at("task").value);
  form.append("stages", [...document.querySelectorAll("#stages input:checked")].map((box) => box.value).join(","));
  forget();
  const mine = asked;
  at("ask").disabled = true;
  tell("answering…");
  try {
    const found = await get("api/ask", { method: "POST", body: form });
    if (mine !== asked) return;
    at("answers").replaceChildren(...found.answers.map(card));
    likely(found.probabilities);
    outline([["true", found.box], ["said", found.answers.at(-1)?.box]]);
    at("truth").hidden = found.truth === null;
    at("truth").textContent = found.truth === null ? "" : `Truth: ${found.truth}`;
    tell("done");
  } catch (error) {
    if (mine === asked) tell(error.message, true);
  } finally {
    if (mine === asked) at("ask").disabled = false;
  }
}

async function start() {
  run = await get("api/run");
  at("run").textContent = run.run;
  at("method").textContent = `method ${run.method}, ${run.tasks.length} tasks`;
  document.title = run.run;
  const option = (value, text) => { const made = make("option", text); made.value = value; return made; };
  if (run.routes || !run.tasks.length) at("task").append(option("", "let the router choose"));
  at("task").append(...run.tasks.map((task) => option(task, task)));
  if (run.task) at("task").value = run.task;
  at("of").append(...run.tasks.map((task) => option(task, task)));
  const last = run.stages[run.stages.length - 1];
  for (const stage of run.stages) {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.value = stage;
    box.checked = stage === 0 || stage === last;
    label.append(box, ` ${stageName(stage)}`);
    at("stages").append(label);
  }
  at("file").addEventListener("change", () => at("file").files[0] && take(at("file").files[0]));
  at("drop").addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
  at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
  at("drop").addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  at("tests").addEventListener("toggle", () => at("tests").open && list());
  at("of").addEventListener("change", list);
  at("search").addEventListener("input", list);
  at("ask").addEventListener("click", ask);
  at("question").addEventListener("input", () => {
    drawn.length = Math.min(drawn.length, at("question").value.split(MARK).length - 1);
    forget();
  });
  at("frame").addEventListener("pointerdown", draw);
  for (const id of ["task", "stages"]) at(id).addEventListener("change", forget);
  document.body.dataset.ready = "yes";
}

start().catch((error) => tell(error.message, true));
