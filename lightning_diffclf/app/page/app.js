// The page asks a question and plays what comes back, draw by draw. It decides nothing: who is out, who has won and how
// sure that is are what the server says; means over the draws so far are taken here, to be looked at.
import { draw as drawFalls } from "/falls.js";

const $ = id => document.getElementById(id);
const SHOWN = 12; // bars
const percent = p => (p > 0.9995 && p < 1 ? "> 99.9 %" : p > 0 && p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
const count = n => n.toLocaleString("en");
const still = matchMedia("(prefers-reduced-motion: reduce)");

const NOTHING = { draws: 0, head: 0, calls: 0, decided: null, map: null, told: false }; // of a run that has not begun

let networks = [], rules = {}, picture = null, run = null, asking = null, timer = null;

// --- what is asked ---------------------------------------------------------------------------------------------------

function choosePicture(blob) {
  choosing++;
  show(blob);
}

function show(blob, example = null) {
  picture = blob;
  $("message").textContent = "";
  URL.revokeObjectURL($("picture").src);
  $("picture").hidden = !blob;
  $("drop-text").hidden = Boolean(blob);
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button.dataset.number === example);
  if (blob) $("picture").src = URL.createObjectURL(blob);
}

$("picture").addEventListener("load", () => $("picture").classList.toggle("small", $("picture").naturalWidth < 64));
$("picture").addEventListener("error", () => {
  $("picture").hidden = true;
  $("drop-text").hidden = false;
});
$("file").addEventListener("change", () => $("file").files.length && choosePicture($("file").files[0]));
addEventListener("paste", event => event.clipboardData.files.length && choosePicture(event.clipboardData.files[0]));
for (const kind of ["dragover", "dragleave", "drop"])
  addEventListener(kind, event => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) choosePicture(event.dataTransfer.files[0]);
  });

let choosing = 0; // how many choices of a picture there have been: the last one counts
let coming = null; // an example that was chosen and is not there yet

function chooseExample(number) {
  const choice = ++choosing;
  coming = bring(number, choice);
  return coming;
}

async function bring(number, choice) {
  try {
    const answer = await fetch(`/examples/${number}.png`);
    if (!answer.ok) throw new Error(answer.statusText);
    const blob = await answer.blob();
    if (choice === choosing) show(blob, String(number));
  } catch (error) {
    if (choice === choosing) $("message").textContent = `the example did not come (${error.message})`;
  }
}

function showExamples(total) {
  for (let number = 0; number < total; number++) {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.dataset.number = number;
    image.src = `/examples/${number}.png`;
    image.alt = `handwritten ${number}`;
    button.append(image);
    button.addEventListener("click", () => chooseExample(number));
    $("examples").append(button);
  }
}

function chooseNetwork() {
  const { kind, labels, fixed, digits } = networks.find(one => one.name === $("network").value);
  $("network-note").textContent = kind;
  $("labels").value = labels.length > 60 ? "" : labels.join(", ");
  $("labels").placeholder = fixed ? `all ${count(labels.length)} classes` : "";
  if (!asking) preview();
  $("labels-note").textContent = fixed
    ? "The classes it was trained on: take some out, or leave this empty for all."
    : "Anything, with commas between; at least two.";
  $("examples").hidden = !digits;
  if (!digits && [...$("examples").children].some(button => button.ariaPressed === "true")) choosePicture(null);
}

function choices(select, names) {
  select.replaceChildren(...names.map(name => Object.assign(document.createElement("option"), { value: name, textContent: name })));
}

$("network").addEventListener("change", chooseNetwork);
const chooseRule = () => ($("rule-note").textContent = rules[$("rule").value]);
$("rule").addEventListener("change", chooseRule);

// The labels at the start line, before anything is asked.
function preview() {
  const names = [...new Set($("labels").value.split(/[,\n]/).map(name => name.trim()).filter(Boolean))];
  const draws = Number($("draws").value), zeros = new Float64Array(names.length);
  run = { ...NOTHING, names, draws, last: new Int32Array(names.length), frames: [{ sums: zeros, behind: zeros, calls: 0, best: 0 }] };
  $("bars").replaceChildren();
  $("falls-card").hidden = $("map-card").hidden = true;
  $("headline").textContent = "Nothing decided yet";
  $("status").textContent = "Choose a picture and labels, and press Decide.";
  render();
}

$("ask").addEventListener("input", () => asking || run.told || preview());

// --- what comes back -------------------------------------------------------------------------------------------------

const hear = {
  begun: () => ($("status").textContent = "Begun."),
  waiting: ({ before }) => ($("status").textContent = `${count(before)} before you.`),
  progress: ({ what, done, total }) => {
    if (run.frames.length > 1) return;
    $("status").textContent = what + (total ? `: ${count(done)} of ${count(total)}` : done ? `: ${count(done)}` : "") + " …";
  },
  asked: ({ names, draws, weights, picture }) => {
    const zeros = new Float64Array(names.length);
    Object.assign(run, { names, draws, weights, last: new Int32Array(names.length) });
    run.frames.push({ sums: zeros, behind: zeros, calls: 0, best: 0 });
    $("seen").src = picture;
    $("bars").replaceChildren();
    render();
  },
  landed: ({ first, candidates, errors, nfe }) => {
    errors.forEach((row, r) => extend(first + r, candidates, row));
    run.calls = nfe;
    play();
  },
  decided: event => {
    run.decided = event;
    play();
  },
  map: event => {
    run.map = event;
    if (run.told) showMap();
  },
  refused: ({ message }) => {
    $("message").textContent = message;
    halt();
    run.frames.length = 0; // nothing to see
  },
};

// One more draw: means over the draws so far, and how far each label is behind the best of those that saw it.
function extend(draw, candidates, errors) {
  const before = run.frames[draw];
  const sums = before.sums.slice(), behind = before.behind.slice();
  let best = -1;
  candidates.forEach((k, i) => {
    run.last[k] = draw + 1;
    if (errors[i] === null) return;
    sums[k] += run.weights[draw] * errors[i];
    if (best < 0 || sums[k] < sums[best]) best = k;
  });
  for (const k of candidates) behind[k] = (sums[k] - sums[best]) / (draw + 1);
  run.frames.push({ sums, behind, best, calls: before.calls + candidates.length });
}

// Whether a label was dropped after the first `draw` draws, as far as is known.
function isOut(k, draw) {
  const last = run.last[k];
  if (!last || last > draw) return false;
  return run.frames.length - 1 > last || (run.decided && last < run.draws && k !== run.decided.winner);
}

// --- how it is played ------------------------------------------------------------------------------------------------

const atEnd = () => run.head === run.frames.length - 1;

function play() {
  if (timer !== null) return;
  if (!atEnd()) {
    run.head = still.matches ? run.frames.length - 1 : run.head + 1;
    render();
    timer = setTimeout(() => { timer = null; play(); }, still.matches ? 0 : Math.max(45, 330 - 20 * run.head));
  } else if (run.decided) {
    run.told = true;
    render();
    showMap();
  }
}

function halt() {
  clearTimeout(timer);
  timer = null;
}

function order() {
  const { behind } = run.frames[run.head], key = k => (isOut(k, run.head) ? run.last[k] : Infinity);
  const winner = run.told && atEnd() ? run.decided.winner : null;
  return run.names.map((_, k) => k).sort((a, b) => (b === winner) - (a === winner) || (key(b) > key(a)) - (key(b) < key(a)) || behind[a] - behind[b]);
}

function render() {
  const frame = run.frames[run.head], told = run.told && atEnd(), ranked = order(), total = run.names.length * run.draws;
  const playing = run.names.filter((_, k) => !isOut(k, run.head)).length;
  const calls = told ? run.decided.nfe : atEnd() && run.calls ? run.calls : frame.calls;
  number("n-draws", count(run.head), `of ${count(run.draws)}`);
  number("n-calls", count(calls), `of ${count(total)}`);
  number("n-play", count(told && run.decided.winner !== null ? Math.max(1, playing) : playing), `of ${count(run.names.length)}`);
  number("n-saved", told ? percent(1 - calls / total) : "–");
  if (told) tell(calls, total);
  else if (run.head) {
    $("headline").textContent = `${run.names[frame.best]} leads`;
    $("status").textContent = `Draw ${count(run.head)} of ${count(run.draws)} at most.`;
  }
  renderBars(frame, ranked, told);
  $("falls-card").hidden = run.head < 1;
  if (run.head) drawFalls($("falls"), run, ranked, isOut);
  $("head").max = run.frames.length - 1;
  $("head").value = run.head;
}

function tell(calls, total) {
  const { winner, probabilities, seconds } = run.decided;
  const name = winner === null ? null : run.names[winner];
  $("headline").textContent = name === null ? "No answer: the network returned nothing finite" : `${name}: ${percent(probabilities[name])}`;
  $("status").textContent = `Decided in ${seconds.toFixed(1)} s by ${count(calls)} network calls` + (calls < total ? ` instead of ${count(total)}.` : ".");
}

function number(id, value, note = "") {
  const small = document.createElement("small");
  small.textContent = note && ` ${note}`;
  $(id).replaceChildren(value, small);
}

function renderBars(frame, ranked, told) {
  const shown = ranked.slice(0, SHOWN), span = Math.max(...shown.map(k => frame.behind[k]), 1e-12);
  const rows = new Map([...$("bars").children].map(row => [Number(row.dataset.k), row]));
  for (const [k, row] of rows) if (!shown.includes(k)) row.remove();
  shown.forEach((k, rank) => {
    const row = rows.get(k) ?? newBar(k), out = isOut(k, run.head), [name, track, value] = row.children;
    row.className = (rank === 0 && run.head ? "first" : "") + (out ? " out" : "");
    row.style.transform = `translateY(calc(${rank} * var(--row)))`;
    track.firstChild.style.transform = `scaleX(${run.head ? Math.max(0.015, 1 - frame.behind[k] / span) : 0})`;
    const draws = `${run.last[k]} draw${run.last[k] === 1 ? "" : "s"}`;
    if (told) value.textContent = percent(run.decided.probabilities[run.names[k]] ?? 0) + (out ? ` · ${draws}` : "");
    else if (!run.head) value.textContent = "";
    else value.textContent = out ? `out · ${draws}` : rank === 0 ? "best" : `+${frame.behind[k].toPrecision(3)}`;
  });
  $("bars").style.height = `calc(${shown.length} * var(--row))`;
  const rest = ranked.length - shown.length;
  $("more").textContent = (rest ? `and ${count(rest)} more. ` : "") + "A longer bar predicts the noise better." + (told ? " Beside it: probability, and the draws of what was dropped." : "");
}

function newBar(k) {
  const row = document.createElement("li"), parts = ["name", "track", "value"].map(name => Object.assign(document.createElement("span"), { className: name }));
  row.dataset.k = k;
  parts[0].textContent = parts[0].title = run.names[k];
  parts[1].append(Object.assign(document.createElement("div"), { className: "bar" }));
  row.append(...parts);
  $("bars").append(row);
  return row;
}

function showMap() {
  $("map-card").hidden = !run.map;
  if (!run.map) return;
  const { winner, rival, picture, nfe } = run.map;
  $("map").src = picture;
  $("map-text").textContent = `Red: here “${winner}” predicts the noise better than “${rival}”. Blue: worse.`;
  $("map-note").textContent = `Their squared errors by place, over ${nfe / 2} draws: ${nfe} network calls more.`;
}

$("head").addEventListener("input", () => { halt(); run.head = Number($("head").value); render(); });
$("again").addEventListener("click", () => { halt(); run.head = 0; play(); });
$("mix").addEventListener("input", () => ($("map").style.opacity = $("mix").value / 100));
addEventListener("resize", () => run?.head && render());

// --- asking ----------------------------------------------------------------------------------------------------------

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

$("ask").addEventListener("submit", async event => {
  event.preventDefault();
  $("decide").disabled = true;
  await coming;
  halt();
  const form = new FormData($("ask"));
  if (picture) form.set("picture", picture, "picture");
  asking = new AbortController();
  run = { ...NOTHING, names: [], frames: [], last: [] };
  $("message").textContent = "";
  $("headline").textContent = "…";
  $("status").textContent = "Asked.";
  $("falls-card").hidden = $("map-card").hidden = true;
  $("decide").disabled = !($("stop").hidden = false);
  if ($("race").getBoundingClientRect().top > innerHeight / 2) $("race").scrollIntoView(); // on a phone
  try {
    const response = await fetch("/decide", { method: "POST", body: form, signal: asking.signal });
    if (response.ok) for await (const event of eventsOf(response)) hear[event.kind](event);
    else hear.refused(await response.json());
  } catch (error) {
    halt();
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") $("message").textContent = `the server does not answer (${error.message})`;
  }
  asking = null;
  $("decide").disabled = !($("stop").hidden = true);
  if (!run.frames.length) preview();
});

$("stop").addEventListener("click", () => asking.abort());

const offer = await (await fetch("/offer")).json();
({ networks, rules } = offer);
choices($("network"), networks.map(one => one.name));
choices($("rule"), Object.keys(rules));
showExamples(offer.examples);
chooseNetwork();
chooseRule();
$("map").style.opacity = $("mix").value / 100;
if (networks[0].digits && offer.examples > 3) await chooseExample(3);
document.documentElement.dataset.ready = "yes";
