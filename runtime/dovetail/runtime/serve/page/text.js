// Draws an answer as text: paragraphs, headings, lists, code. Every node is made of plain text, never of HTML.

/** Splits a text into blocks. The last block may still grow. */
export function blocksOf(text) {
  const blocks = [];
  let open = null;
  const close = () => { if (open) blocks.push(open); open = null; };
  const grow = (kind, line) => {
    if (open?.kind !== kind) { close(); open = { kind, lines: [] }; }
    open.lines.push(line);
  };
  for (const line of text.split("\n")) {
    if (open?.kind === "code") {
      if (line.trim() === open.fence) { open.closed = true; close(); } else open.lines.push(line);
      continue;
    }
    const fence = line.match(/^\s{0,3}(```+|~~~+)\s*([^`]*)$/);
    const item = line.match(/^\s*(?:([-*+])|\d{1,9}[.)])\s+(.*)$/);
    const head = line.match(/^#{1,6}\s+(.*?)\s*#*$/);
    if (fence) { close(); open = { kind: "code", fence: fence[1], language: fence[2].trim(), lines: [] }; }
    else if (!line.trim()) close();
    else if (head) { close(); blocks.push({ kind: "head", lines: [head[1]] }); }
    else if (item) grow(item[1] ? "bullets" : "numbers", item[2]);
    else if (open && open.kind !== "words" && /^\s{2,}\S/.test(line)) open.lines.push(`${open.lines.pop()} ${line.trim()}`);
    else grow("words", line);
  }
  close();
  return blocks;
}

/** Makes `place` show `text`. Blocks that did not change keep their nodes, and with them a selection. */
export function draw(place, text) {
  const blocks = blocksOf(text), shown = place.children;
  blocks.forEach((block, index) => {
    const key = JSON.stringify(block), old = shown[index];
    if (old?.dataset.key === key) return;
    if (block.kind === "code" && old?.dataset.kind === "code" && old.dataset.language === block.language) {
      old.querySelector("code").textContent = block.lines.join("\n");
      old.dataset.key = key;
      return;
    }
    const node = nodeOf(block);
    node.dataset.key = key;
    node.dataset.kind = block.kind;
    if (old) old.replaceWith(node); else place.append(node);
  });
  while (shown.length > blocks.length) place.lastChild.remove();
}

export function element(name, attributes = {}, ...content) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value); else node.setAttribute(key, value);
  }
  node.append(...content);
  return node;
}

function nodeOf(block) {
  if (block.kind === "code") return codeOf(block);
  if (block.kind === "head") return element("h4", {}, ...inline(block.lines[0]));
  if (block.kind === "words") return element("p", {}, ...inline(block.lines.join("\n")));
  const items = block.lines.map((line) => element("li", {}, ...inline(line)));
  return element(block.kind === "bullets" ? "ul" : "ol", {}, ...items);
}

function codeOf(block) {
  const code = element("code", {}, block.lines.join("\n"));
  const copy = element("button", { type: "button", class: "quiet" }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not allowed here"; // browsers let pages of https and localhost alone copy
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });
  const head = element("header", {}, element("span", {}, block.language || "code"), copy);
  const name = `Code, ${block.language || "no language"}`;
  const pre = element("pre", { tabindex: "0", role: "group", "aria-label": name }, code);
  const node = element("div", { class: "code" }, head, pre);
  node.dataset.language = block.language;
  return node;
}

/** Returns nodes for a line: `code`, **strong**, *emphasis*, and text. */
function inline(text) {
  const nodes = [], pattern = /(`+)([^`]+)\1|\*\*(\S(?:.*?\S)?)\*\*|\*([^\s*](?:[^*\n]*[^\s*])?)\*/g;
  let done = 0;
  for (const found of text.matchAll(pattern)) {
    nodes.push(text.slice(done, found.index));
    if (found[2] !== undefined) nodes.push(element("code", {}, found[2]));
    else if (found[3] !== undefined) nodes.push(element("strong", {}, found[3]));
    else nodes.push(element("em", {}, found[4]));
    done = found.index + found[0].length;
  }
  nodes.push(text.slice(done));
  return nodes.filter((node) => node !== "").flatMap((node) => (typeof node === "string" ? lines(node) : [node]));
}

function lines(text) {
  return text.split("\n").flatMap((line, index) => (index ? [element("br"), line] : [line]));
}
