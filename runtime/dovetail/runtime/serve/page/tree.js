// Draws what a round did: the draft tree, and a bar for each round.

const SPACE = "http://www.w3.org/2000/svg";
const ROW = 32, GAP = 20, HIGH = 24, LETTER = 7.25, MARGIN = 16, LONGEST = 14;
const LEAST_SCALE = 0.85; // a wider tree scrolls

export function shape(name, attributes = {}, ...content) {
  const node = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...content);
  return node;
}

/** Returns a token's text with its spaces and line breaks made visible, cut to a length that fits. */
export function visible(text) {
  const shown = [...text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")];
  return shown.length > LONGEST ? shown.slice(0, LONGEST - 1).join("") + "…" : shown.join("") || "∅";
}

/** Returns the place of each node: levels go right, and a node stands in the row of its first child.
 *
 * `straight`: nodes that come before their siblings, so that they stand in one row.
 */
export function layout(tokens, parents, straight = new Set()) {
  const children = tokens.map(() => []), depth = tokens.map(() => 0);
  parents.forEach((parent, node) => {
    if (parent < 0) return;
    children[parent].push(node);
    depth[node] = depth[parent] + 1;
  });
  for (const each of children) each.sort((one, other) => straight.has(other) - straight.has(one));
  const row = tokens.map(() => 0), waiting = [0];
  let rows = 0;
  while (waiting.length) { // depth first; the first child takes the row of its parent
    const node = waiting.pop();
    row[node] = children[parents[node]]?.[0] === node ? row[parents[node]] : rows++;
    waiting.push(...children[node].toReversed());
  }
  const labels = tokens.map(visible), widths = labels.map((label) => Math.round([...label].length * LETTER) + 14);
  const columns = [];
  depth.forEach((level, node) => { columns[level] = Math.max(columns[level] ?? 0, widths[node]); });
  const left = [MARGIN];
  columns.forEach((width, level) => { left[level + 1] = left[level] + width + GAP; });
  return {
    width: left.at(-1) - GAP + MARGIN, height: rows * ROW + 2 * MARGIN - (ROW - HIGH),
    nodes: tokens.map((_, node) => (
      { label: labels[node], x: left[depth[node]], y: MARGIN + row[node] * ROW, width: widths[node] })),
  };
}

/** Returns the path of an edge: straight in a row, else down between the levels with round corners. */
function line(from, to) {
  const [x1, y1, x2, y2] = [from.x + from.width, from.y + HIGH / 2, to.x, to.y + HIGH / 2];
  if (y1 === y2) return `M${x1} ${y1}H${x2}`;
  const bend = x2 - GAP / 2, turn = Math.sign(y2 - y1) * 6;
  return `M${x1} ${y1}H${bend - 6}Q${bend} ${y1} ${bend} ${y1 + turn}V${y2 - turn}Q${bend} ${y2} ${bend + 6} ${y2}H${x2}`;
}

/** Shows a round's tree. The model's own token after the accepted path is part of the picture. */
export function drawTree(place, round) {
  const { tokens, parents, accepted, next } = round.tree;
  const all = next === null ? tokens : [...tokens, next];
  const tip = accepted.at(-1) ?? 0;
  const picture = layout(all, next === null ? parents : [...parents, tip], new Set([...accepted, tokens.length]));
  const kept = new Set(accepted);
  const kind = (node) =>
    node === 0 ? "known" : node === tokens.length ? "next" : kept.has(node) ? "kept" : "left";
  const room = place.clientWidth || picture.width, scale = Math.max(LEAST_SCALE, Math.min(1, (room - 2) / picture.width));
  const svg = shape("svg", {
    width: picture.width * scale, height: picture.height * scale, viewBox: `0 0 ${picture.width} ${picture.height}`,
    role: "img", "aria-label": told(round),
  });
  const order = all.map((_, node) => node).sort((a, b) => (kind(a) === "left" ? 0 : 1) - (kind(b) === "left" ? 0 : 1));
  for (const node of order) {
    const parent = node === tokens.length ? tip : parents[node];
    if (parent < 0) continue;
    svg.append(shape("path", { class: `edge ${kind(node)}`, d: line(picture.nodes[parent], picture.nodes[node]) }));
  }
  for (const node of order) {
    const { x, y, width, label } = picture.nodes[node];
    svg.append(shape("g", { class: `node ${kind(node)}` },
      shape("rect", { x, y, width, height: HIGH, rx: 8 }),
      shape("text", { x: x + width / 2, y: y + HIGH / 2 + 4, "text-anchor": "middle" }, label)));
  }
  place.replaceChildren(svg);
  place.scrollLeft = (picture.nodes[tip].x + picture.nodes[tip].width) * scale - room * 0.75; // the path's end is in view
}

/** Returns a round in words. */
export function told(round) {
  const { tokens, accepted, next } = round.tree;
  const drafted = tokens.length - 1, kept = accepted.map((node) => JSON.stringify(tokens[node])).join(", ");
  const own = next === null ? "" : ` The model's own token is ${JSON.stringify(next)}.`;
  if (!drafted) return `Plain round.${own}`;
  return `${drafted} drafted ${drafted === 1 ? "token" : "tokens"}, ${accepted.length} accepted${kept ? `: ${kept}` : ""}.${own}`;
}

/** Bars of a run's rounds: accepted tokens, and the model's own one below them. */
export class Bars {
  #most = 4;
  constructor(svg) { this.svg = svg; this.clear(); }

  clear() {
    this.rounds = 0;
    this.#most = 4;
    this.mark = shape("rect", { class: "picked", y: 0, width: 0 });
    this.svg.replaceChildren(this.mark);
    this.#scale();
  }

  add(round) {
    const own = round.tree.next === null ? 0 : 1, kept = round.tree.accepted.length, x = this.rounds * 8;
    this.svg.append(shape("rect", { class: "own", x, width: 6, y: -own, height: own }));
    this.svg.append(shape("rect", { class: "kept", x, width: 6, y: -own - kept, height: kept }));
    this.rounds += 1;
    this.#most = Math.max(this.#most, own + kept);
    this.#scale();
  }

  pick(index) {
    this.mark.setAttribute("x", index * 8 - 1);
    this.mark.setAttribute("width", 8);
  }

  #scale() {
    this.svg.setAttribute("viewBox", `-1 ${-this.#most} ${Math.max(this.rounds, 1) * 8} ${this.#most}`);
    this.mark.setAttribute("y", -this.#most);
    this.mark.setAttribute("height", this.#most);
  }
}
