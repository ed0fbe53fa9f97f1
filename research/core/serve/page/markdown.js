// Markdown to DOM nodes. Text only ever becomes text nodes: no markup of a model's or a user's reaches the parser of the
// browser. Known: headings, lists, fences, quotes, tables, rules; code, strong, emphasis, strike, links to http(s).

/** Nodes for `text`. An unfinished construct (an answer that is still coming) is shown as far as it goes. */
export function render(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s*>\s?(.*)$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12;

function blocks(lines, depth = 0) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const [from, to] = fenced(lines, at, match[2]);
      nodes.push(code(lines.slice(from, to).map((row) => unindent(row, match[1].length)).join("\n"), match[3].trim()));
      at = to + 1;
    } else if ((match = HEADING.exec(line))) {
      nodes.push(element(`h${Math.min(match[1].length, 4)}`, inline(match[2])));
      at += 1;
    } else if (RULE.test(line)) {
      nodes.push(element("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const inner = [];
      for (; at < lines.length && (match = QUOTE.exec(lines[at])); at++) inner.push(match[1]);
      nodes.push(element("blockquote", blocks(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = list(lines, at, nodes, depth);
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_LINE.test(lines[at + 1])) {
      at = table(lines, at, nodes);
    } else {
      const rows = [line];
      for (at += 1; at < lines.length && lines[at].trim() && !begins(lines[at]); at++) rows.push(lines[at]);
      nodes.push(element("p", paragraph(rows)));
    }
  }
  return nodes;
}

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function fenced(lines, at, mark) {
  for (let end = at + 1; end < lines.length; end++) {
    const closing = lines[end].trim();
    if (closing.length >= mark.length && closing === mark[0].repeat(closing.length)) return [at + 1, end];
  }
  return [at + 1, lines.length];
}

function unindent(line, columns) {
  let taken = 0;
  while (taken < columns && line[taken] === " ") taken++;
  return line.slice(taken);
}

function list(lines, at, nodes, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const own = first[1].length;
  const items = [];
  let blank = false;
  for (; at < lines.length; at++) {
    const line = lines[at];
    const match = ITEM.exec(line);
    const indent = line.length - line.trimStart().length;
    if (match && indent < own + 2 && indent >= own - 1) {
      if (/\d/.test(match[2]) !== ordered) break;
      items.push([match[4]]);
    } else if (!line.trim()) {
      items.at(-1).push("");
    } else if (indent > own + 1) {
      items.at(-1).push(unindent(line, own + 2));
    } else if (blank || begins(line)) {
      break;
    } else {
      items.at(-1).push(line); // the paragraph goes on without an indent
    }
    blank = !line.trim();
  }
  const made = element(ordered ? "ol" : "ul", items.map((rows) => element("li", item(rows, depth))));
  const start = parseInt(first[2], 10);
  if (ordered && start !== 1) made.start = start;
  nodes.push(made);
  return at;
}

function item(rows, depth) {
  const nodes = blocks(rows, depth + 1);
  if (nodes.length && nodes[0].tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
  return nodes;
}

function table(lines, at, nodes) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const head = cells(lines[at]);
  const rows = [];
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) rows.push(cells(lines[at]));
  const row = (kind, texts) => element("tr", head.map((_, column) => element(kind, inline(texts[column] ?? ""))));
  const made = element("table", [
    element("thead", [row("th", head)]),
    element("tbody", rows.map((texts) => row("td", texts))),
  ]);
  nodes.push(classed(element("div", [made]), "table"));
  return at;
}

function code(text, language) {
  const copy = element("button", ["Copy"]);
  copy.type = "button";
  copy.dataset.copy = "code";
  const head = element("div", [element("span", [language.split(/\s/)[0] || "text"]), copy]);
  return classed(element("div", [head, element("pre", [element("code", [text])])]), "code");
}

function paragraph(rows) {
  const nodes = [];
  rows.forEach((row, index) => {
    if (index) nodes.push(element("br"));
    nodes.push(...inline(row.trim()));
  });
  return nodes;
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(\S|\S[\s\S]*?\S)\*\*|~~(\S[\s\S]*?)~~|\*([^\s*]|[^\s*][^*]*?[^\s*])\*|(?<!\w)_([^\s_]|[^\s_][^_]*?[^\s_])_(?!\w)|\[([^\][]+)\]\((https?:\/\/[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)\)|https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?]|\\([\\`*_{}[\]()#+.!|~-])/g;

function inline(text, depth = 0) {
  const nodes = [];
  let done = 0;
  for (const match of depth > DEEPEST ? [] : text.matchAll(INLINE)) {
    if (match.index > done) nodes.push(text.slice(done, match.index));
    done = match.index + match[0].length;
    const [whole, ticks, tick, strong, strike, star, under, label, address, escaped] = match;
    if (ticks) nodes.push(element("code", [tick.replace(/^ (.*\S.*) $/, "$1")]));
    else if (strong) nodes.push(element("strong", inline(strong, depth + 1)));
    else if (strike) nodes.push(element("del", inline(strike, depth + 1)));
    else if (star ?? under) nodes.push(element("em", inline(star ?? under, depth + 1)));
    else if (label) nodes.push(link(address, inline(label, depth + DEEPEST)));
    else if (escaped) nodes.push(escaped);
    else nodes.push(link(whole, [whole]));
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

function link(address, children) {
  const made = element("a", children);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function element(name, children = []) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function classed(node, name) {
  node.className = name;
  return node;
}
