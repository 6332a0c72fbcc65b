"use strict";
// The browser of answers. Everything from data goes into the page as text, never as HTML.
const data = JSON.parse(document.getElementById("answers").textContent);
const form = document.getElementById("filters");
const list = document.getElementById("found");
const more = document.getElementById("more");
const PAGE = 24;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const setAt = (task, stage) => {
  const index = task.sets.findIndex((set) => set.stages.includes(stage));
  return index < 0 ? null : index;
};

// What became of an answer between its task's own stage and the last one; null where either was not evaluated.
function fateOf(task, row) {
  const [own, last] = [setAt(task, task.learned_at), setAt(task, data.last)];
  if (own === null || last === null) return null;
  const [before, after] = [own, last].map((set) => row[4][row[5][set]][1]);
  return before ? (after ? "kept" : "forgotten") : after ? "gained" : "never";
}

const FATES = {
  kept: "right, then right", forgotten: "right, then wrong", gained: "wrong, then right", never: "wrong, then wrong",
};

const entries = data.tasks.flatMap((task) =>
  task.rows.map((row, index) => ({
    task, row, index, fate: fateOf(task, row),
    text: [row[0], row[1], ...row[4].map((answer) => answer[0])].join("\n").toLowerCase(),
  })),
);

function setOf(task, stage) {
  const learned = setAt(task, task.learned_at) ?? task.sets.length - 1;
  return stage === "own" ? learned : setAt(task, Number(stage));
}

const SORTS = {
  stream: null,
  sure: (a, b) => (b.sure ?? -1) - (a.sure ?? -1),
  unsure: (a, b) => (a.sure ?? 2) - (b.sure ?? 2),
  low: (a, b) => a.answer[2] - b.answer[2],
  high: (a, b) => b.answer[2] - a.answer[2],
  question: (a, b) => a.entry.row[0].localeCompare(b.entry.row[0]),
  answer: (a, b) => a.answer[0].localeCompare(b.answer[0]),
  truth: (a, b) => a.entry.row[1].localeCompare(b.entry.row[1]),
};

function chosen() {
  const { task, stage, show, fate, kind, sort, text } = Object.fromEntries(new FormData(form));
  const words = text.toLowerCase().trim();
  const found = [];
  for (const entry of entries) {
    if (task !== "" && entry.task !== data.tasks[Number(task)]) continue;
    if (kind !== "" && entry.row[2] !== Number(kind)) continue;
    if (fate !== "" && entry.fate !== fate) continue;
    if (words && !entry.text.includes(words)) continue;
    const set = setOf(entry.task, stage);
    if (set === null) continue;
    const answer = entry.row[4][entry.row[5][set]];
    if (show === "wrong" && answer[1]) continue;
    if (show === "right" && !answer[1]) continue;
    if (show === "sample" && answer[1] && !entry.row[6]) continue;
    found.push({ entry, answer, sure: entry.task.sets[set].sure[entry.index] ?? null });
  }
  if (SORTS[sort]) found.sort(SORTS[sort]);
  return found;
}

// `1`, `2–5` or `1, 3–4`.
function ranges(numbers) {
  const parts = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}

function stagesLabel(task, stages) {
  const label = `${stages.length > 1 ? "Stages" : "Stage"} ${ranges(stages)}`;
  if (stages.includes(0) && stages.length === 1) return "Base model (stage 0)";
  if (Math.max(...stages) < task.learned_at) return `${label}, before it was learned`;
  return stages.includes(task.learned_at) ? `${label}, learned at ${task.learned_at}` : `${label}, later`;
}

// Before the task was learned, when it was, and at the end; what was said at other stages is folded away.
function shownStages(task) {
  const stages = task.sets.flatMap((set) => set.stages).sort((a, b) => a - b);
  return [stages.filter((stage) => stage < task.learned_at).at(-1), task.learned_at, stages.at(-1)];
}

// The true box and the one that was said, over the first picture; each in shares of its width and height.
function framed(picture, boxes) {
  const frame = make("div", "framed");
  frame.append(picture);
  for (const [kind, box] of boxes) {
    if (!box) continue;
    const outline = make("i", kind);
    const [left, top, right, bottom] = box.map((share) => Math.min(1, Math.max(0, share)));
    Object.assign(outline.style, {
      left: `${100 * left}%`, top: `${100 * top}%`,
      width: `${100 * Math.max(0, right - left)}%`, height: `${100 * Math.max(0, bottom - top)}%`,
    });
    frame.append(outline);
  }
  return frame;
}

function card({ entry, answer, sure }) {
  const { task, row, fate } = entry;
  const node = make("article", answer[1] ? "answer hit" : "answer");
  const pictures = make("div", "pictures");
  for (const place of row[3]) {
    const picture = make("img");
    picture.loading = "lazy";
    picture.alt = `image of question ${entry.index + 1} of ${task.name}`;
    picture.src = data.thumbnails[place];
    const first = place === row[3][0] && row[7];
    pictures.append(first ? framed(picture, [["true-box", row[7]], ["said-box", answer[3]]]) : picture);
  }
  if (row[3].length) node.append(pictures);
  const body = make("div", "body");
  const title = make("div", "what");
  const dot = make("i", "dot");
  if (task.color) dot.style.background = task.color;
  title.append(dot, make("strong", "", answer[1] ? "Right" : "Wrong"));
  title.append(` · ${task.name} · ${row[2] ? "closed" : "open"}${fate && fate !== "kept" && fate !== "never" ? ` · ${fate}` : ""}`);
  if (sure !== null) title.append(` · probability ${(100 * sure).toFixed(0)} %`);
  body.append(title, make("p", "question", row[0]));
  const pairs = make("dl");
  pairs.append(make("dt", "", "Truth"), make("dd", "", row[1]));
  const others = make("dl");
  let hidden = 0;
  row[4].forEach(([text, right, score], number) => {
    const stages = task.sets.flatMap((set, index) => (row[5][index] === number ? set.stages : []));
    const main = shownStages(task).some((stage) => stages.includes(stage));
    const said = make("dd", right ? "good" : "bad", `${right ? "✓" : "✗"} ${text || "(empty)"}`);
    if (!row[2]) said.append(make("span", "soft", ` F1 ${(100 * score).toFixed(0)} %`));
    (main ? pairs : others).append(make("dt", "", stagesLabel(task, stages)), said);
    hidden += main ? 0 : 1;
  });
  body.append(pairs);
  if (hidden) {
    const details = make("details");
    details.append(make("summary", "", `${hidden} other ${hidden > 1 ? "answers" : "answer"} in between`), others);
    body.append(details);
  }
  node.append(body);
  return node;
}

let found = [];
let shown = 0;

function showMore() {
  list.append(...found.slice(shown, shown + PAGE).map(card));
  shown = Math.min(found.length, shown + PAGE);
  more.hidden = shown === found.length;
  more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
}

function refresh() {
  found = chosen();
  const wrong = found.filter(({ answer }) => !answer[1]).length;
  document.getElementById("count").textContent =
    `${found.length} of ${entries.length} questions: ${wrong} wrong, ${found.length - wrong} right`;
  list.replaceChildren();
  shown = 0;
  showMore();
}

function option(select, value, text) {
  const node = make("option", "", text);
  node.value = value;
  select.append(node);
}

data.tasks.forEach((task, index) => option(form.elements.task, index, task.name));
const stages = [...new Set(data.tasks.flatMap((task) => task.sets.flatMap((set) => set.stages)))];
for (const stage of stages.sort((a, b) => a - b)) {
  option(form.elements.stage, stage, stage ? `after stage ${stage}${stage === data.last ? ", the last" : ""}` : "base model");
}
for (const fate of Object.keys(FATES)) {
  const count = entries.filter((entry) => entry.fate === fate).length;
  if (count) option(form.elements.fate, fate, `${fate}: ${FATES[fate]} (${count})`);
}
if (!data.tasks.some((task) => task.sets.some((set) => set.sure.length))) {
  for (const value of ["sure", "unsure"]) form.elements.sort.querySelector(`[value=${value}]`).remove();
}
form.elements.fate.disabled = form.elements.fate.options.length === 1;

let waiting;
form.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(refresh, 120);
});
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", showMore);

// One row an answer, with what joins it to other tables; what is not known is an empty cell.
function csvRows(answers) {
  const rows = answers.map(({ entry: { task, row, index, fate }, answer, sure }) => [
    task.name, index, ...task.keys[index], row[2] ? "CLOSED" : "OPEN", row[0], row[1], answer[0], answer[1], answer[2], fate ?? "", sure ?? "",
  ]);
  return [
    ["task", "row", "question_id", "image", "patient", "answer_type", "question", "truth", "answer", "right", "score", "fate", "probability"],
    ...rows,
  ];
}

document.getElementById("save").addEventListener("click", () => saveCsv(`${document.title} answers`, csvRows(found)));
refresh();
