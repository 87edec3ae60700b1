// The chart of how labels fall: a line for each, how far its mean error is above that of the best one, by draw.
const NAMED = 12, GAP = 15, LINES = 200;

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A step of 1, 2 or 5 times a power of ten, so that about `parts` of them make `span`.
function step(span, parts) {
  const rough = span / parts, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find(one => one * power >= 0.75 * rough);
}

// Heights as wished, moved apart so that names do not lie on each other; within [top, bottom] if there is room.
function apart(places, top, bottom) {
  places.sort((a, b) => a.y - b.y);
  let least = top;
  for (const place of places) least = (place.y = Math.max(place.y, least)) + GAP;
  let most = bottom;
  for (const place of places.reverse()) most = (place.y = Math.min(place.y, most)) - GAP;
}

export function draw(svg, { frames, names, last, head }, ranked, isOut) {
  const width = svg.clientWidth, height = svg.clientHeight;
  const longest = Math.max(...ranked.slice(0, NAMED).map(k => Math.min(names[k].length, 14)));
  const left = 46, right = width - Math.min(12 + 7.5 * longest, width / 3), top = 8, bottom = height - 40;
  const draws = Math.max(head, 6), drawn = ranked.slice(0, LINES);
  let span = 1e-12;
  for (let n = 1; n <= head; n++) for (const k of drawn) if (last[k] >= n) span = Math.max(span, frames[n].behind[k]);
  // Most labels fall in the first draws: these get more room.
  const x = n => left + (Math.log(n) / Math.log(draws)) * (right - left), y = behind => top + (behind / span) * (bottom - top);
  const parts = [], places = [];

  const rise = step(span, 4), digits = Math.max(0, -Math.floor(Math.log10(rise)));
  for (let value = 0; value <= span * 1.001; value += rise) {
    parts.push(element("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }));
    parts.push(element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value ? `+${value.toFixed(digits)}` : "best"));
  }
  const powers = [1, 10, 100, 1000].flatMap(power => [1, 2, 5].map(one => one * power));
  for (const n of [...powers.filter(n => n < 0.8 * draws), draws])
    parts.push(element("text", { x: x(n), y: bottom + 18, "text-anchor": "middle" }, n));
  parts.push(element("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, "draw"));

  const inPlay = ranked.filter(k => !isOut(k, head));
  const kind = k => (k === ranked[0] ? "first" : k === (inPlay[1] ?? ranked[1]) ? "second" : "");
  for (const k of [...drawn].reverse()) {
    const end = Math.min(last[k], head);
    if (!end) continue;
    const points = Array.from({ length: end }, (_, i) => `${x(i + 1).toFixed(1)} ${y(frames[i + 1].behind[k]).toFixed(1)}`);
    parts.push(element("path", { class: `fall ${kind(k)}`, d: `M${points.join("L")}${end === 1 ? "h0.1" : ""}` }));
    const at = { x: x(end), y: y(frames[end].behind[k]) };
    if (isOut(k, head)) parts.push(element("path", { class: `cross ${kind(k)}`, d: `M${at.x - 4} ${at.y - 4}l8 8m0 -8l-8 8` }));
    if (ranked.indexOf(k) < NAMED) places.push({ k, end, x: at.x + 9, y: at.y });
  }
  for (const end of new Set(places.map(place => place.end))) apart(places.filter(place => place.end === end), top, bottom);
  for (const { k, x, y } of places) {
    const name = names[k].length > 14 ? `${names[k].slice(0, 13)}…` : names[k];
    parts.push(element("text", { x, y: y + 4, class: `label ${kind(k)}` }, name));
  }
  svg.replaceChildren(...parts);
}
