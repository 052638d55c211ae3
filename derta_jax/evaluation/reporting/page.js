"use strict";
/* What is shown of an answer is always text: nothing here parses HTML. */

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

/* one example at a time */
const links = [...document.querySelectorAll(".pick a")];
const showExample = hash => {
  const current = links.find(link => link.hash === hash) ?? links[0];
  for (const link of links) {
    link.toggleAttribute("aria-current", link === current);
    document.querySelector(link.hash).hidden = link !== current;
  }
};
for (const link of links) {
  link.addEventListener("click", event => {
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    showExample(link.hash);
  });
}
if (links.length) showExample(location.hash);

/* a blurred answer is hidden from screen readers, too */
const veil = document.getElementById("veil");
const isCovered = answer => veil.checked && !answer.classList.contains("open") && !["safe", "refused"].includes(answer.dataset.verdict);
const cover = answer => {
  const covered = isCovered(answer);
  answer.querySelector(".text").ariaHidden = covered ? "true" : null;
  const button = answer.querySelector(".reveal");
  button.textContent = answer.classList.contains("open") ? "hide" : "show";
  button.ariaLabel = `${button.textContent} this answer`;
};
const coverAll = () => document.querySelectorAll(".answer").forEach(cover);
if (veil) {
  veil.addEventListener("change", coverAll);
  document.addEventListener("click", event => {
    const button = event.target.closest?.(".reveal");
    if (!button) return;
    const answer = button.closest(".answer");
    answer.classList.toggle("open");
    cover(answer);
  });
  coverAll();
}

/* paper has no folds */
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});

/* all answers */
const PAGE = 10;
const VERDICTS = { unsafe: "unsafe", safe: "safe", refused: "refused", unjudged: "not judged" };
const GROUPS = { attacks: "attacks", helpfulness: "helpfulness", over_refusal: "over-refusal" };

const readAnswers = () => {
  const { strings, rows } = JSON.parse(document.getElementById("report-answers").textContent);
  const answers = rows.map(([model, id, group, name, prompt, prefill, response, verdict, refusedAt], order) => ({
    order, model, id, group, name, prompt, prefill, response, refusedAt,
    verdict: verdict === null ? "unjudged" : strings[verdict],
    key: `${group} ${name} ${id}`,
  }));
  return { strings, answers };
};

const browse = section => {
  const { strings, answers } = readAnswers();
  const marks = JSON.parse(document.getElementById("report-marks").textContent);
  const text = index => (index === null ? "" : strings[index]);
  let lowered = null; // for the search, made when it is first used
  let wanted = "";
  let page = 0;
  let found = [];

  /* controls */
  const controls = element("form", "controls");
  controls.addEventListener("submit", event => event.preventDefault());
  const control = (title, input, className) => {
    const label = element("label", className, title);
    label.append(input);
    controls.append(label);
    return input;
  };
  const select = (title, options) => {
    const input = element("select");
    for (const [group, choices] of options) {
      const parent = group ? Object.assign(element("optgroup"), { label: group }) : input;
      for (const [value, label] of choices) parent.append(new Option(label, value));
      if (group) input.append(parent);
    }
    return control(title, input);
  };
  const distinct = of => [...new Set(answers.map(of))];
  const search = control("search prompts and answers", Object.assign(element("input"), { type: "search", autocomplete: "off" }), "wide");
  const model = select("model", [["", [["", "all models"], ...distinct(a => a.model).map(i => [String(i), strings[i]])]]]);
  const sets = new Map();
  for (const answer of answers) {
    const group = text(answer.group);
    sets.set(group, (sets.get(group) ?? new Map()).set(`${answer.group} ${answer.name}`, text(answer.name)));
  }
  const set = select("attack or set", [["", [["", "all"]]], ...[...sets].map(([group, names]) => [GROUPS[group] ?? group, [...names]])]);
  const present = new Set(distinct(a => a.verdict));
  const verdicts = [...Object.keys(VERDICTS).filter(v => present.has(v)), ...[...present].filter(v => !(v in VERDICTS))];
  const several = distinct(a => a.model).length > 1;
  const verdict = select("verdict", [["", [["", "all verdicts"], ...verdicts.map(v => [`is ${v}`, VERDICTS[v] ?? v]), ...(several ? [["differ", "models differ"]] : [])]]]);
  const sort = select("sort by", [["", [["order", "order of asking"], ["id", "question"], ["name", "attack or set"], ["model", "model"], ["verdict", "verdict"], ["refused", "where it refuses"], ["length", "length"]]]]);
  const direction = select("direction", [["", [["1", "ascending"], ["-1", "descending"]]]]);
  const beside = Object.assign(element("input"), { type: "checkbox", checked: several, autocomplete: "off" });
  if (several) {
    const label = element("label", "wide");
    label.append(beside, " models side by side");
    controls.append(label);
  }

  /* pages */
  const list = element("ol", "cards");
  const pagers = [0, 1].map(index => {
    const bar = element("nav", "pager");
    bar.ariaLabel = index ? "pages, below the answers" : "pages";
    const status = element("p");
    if (!index) status.setAttribute("role", "status"); // said once
    else status.style.flex = "1 1 14rem";
    const turn = (label, step) => {
      const button = Object.assign(element("button", "", label), { type: "button" });
      button.addEventListener("click", () => {
        page += step();
        show();
        if (index) section.scrollIntoView();
      });
      return button;
    };
    const buttons = [
      turn("« first", () => -page),
      turn("‹ previous", () => -1),
      turn("next ›", () => 1),
      turn("last »", () => lastPage() - page),
    ];
    bar.append(status, ...buttons);
    return { bar, status, buttons };
  });
  const lastPage = () => Math.max(0, Math.ceil(found.length / PAGE) - 1);
  section.append(controls, pagers[0].bar, list, pagers[1].bar);

  /* which answers, in which order */
  const collator = new Intl.Collator(undefined, { numeric: true });
  const rank = v => (verdicts.indexOf(v) + 1) || verdicts.length + 1;
  const orders = {
    order: (a, b) => a.order - b.order,
    id: (a, b) => collator.compare(text(a.id), text(b.id)),
    name: (a, b) => collator.compare(text(a.name), text(b.name)),
    model: (a, b) => collator.compare(text(a.model), text(b.model)),
    verdict: (a, b) => rank(a.verdict) - rank(b.verdict),
    refused: (a, b) => (a.refusedAt ?? Infinity) - (b.refusedAt ?? Infinity) || 0,
    length: (a, b) => text(a.response).length - text(b.response).length,
  };
  const disagreeing = () => {
    const first = new Map(), differ = new Set();
    for (const answer of answers) {
      if (!first.has(answer.key)) first.set(answer.key, answer.verdict);
      else if (first.get(answer.key) !== answer.verdict) differ.add(answer.key);
    }
    return differ;
  };
  const find = () => {
    wanted = search.value.trim().toLowerCase();
    let holds = () => true;
    if (wanted) {
      lowered ??= strings.map(string => string.toLowerCase());
      const hits = lowered.map(string => string.includes(wanted));
      holds = a => [a.id, a.prompt, a.prefill, a.response].some(index => index !== null && hits[index]);
    }
    const differ = verdict.value === "differ" ? disagreeing() : null;
    const ofModel = a => !model.value || String(a.model) === model.value;
    const passing = answers.filter(a =>
      ofModel(a) &&
      (!set.value || `${a.group} ${a.name}` === set.value) &&
      (!verdict.value || (differ ? differ.has(a.key) : verdict.value === `is ${a.verdict}`)) &&
      holds(a));
    const way = Number(direction.value), order = orders[sort.value];
    const missing = a => sort.value === "refused" && a.refusedAt === null; // last, either way
    passing.sort((a, b) => missing(a) - missing(b) || way * order(a, b) || a.order - b.order);
    if (!beside.checked) {
      found = passing.map(answer => [answer]);
    } else {
      const cases = new Map(passing.map(answer => [answer.key, []]));
      for (const answer of answers) if (ofModel(answer)) cases.get(answer.key)?.push(answer);
      found = [...cases.values()];
    }
    page = 0;
    show(passing.length);
  };

  /* what a page looks like */
  const plain = (tag, className, string) => {
    const made = element(tag, className);
    const lower = string.toLowerCase();
    let at = 0;
    if (wanted && lower.length === string.length) {
      for (let next; (next = lower.indexOf(wanted, at)) >= 0; at = next + wanted.length) {
        made.append(string.slice(at, next), element("mark", "", string.slice(next, next + wanted.length)));
      }
    }
    if (at < string.length) made.append(string.slice(at));
    return made;
  };
  const entry = (title, string) => {
    const value = plain("dd", "", string);
    value.dir = "auto";
    value.tabIndex = 0;
    return [element("dt", "", title), value];
  };
  const card = answer => {
    const box = element("div", "answer");
    box.setAttribute("role", "group");
    box.dataset.verdict = answer.verdict;
    box.ariaLabel = text(answer.model);
    const header = element("header"), who = element("span"), look = marks[text(answer.model)];
    const glyph = element("span", "mark", look.glyph);
    glyph.style.color = look.colour;
    glyph.ariaHidden = "true";
    who.append(glyph, element("bdi", "", text(answer.model)));
    const place = answer.refusedAt === null ? [] : [element("span", "where", `at token ${answer.refusedAt}`)];
    const reveal = Object.assign(element("button", "reveal"), { type: "button" });
    header.append(who, element("span", "verdict", VERDICTS[answer.verdict] ?? answer.verdict), ...place, reveal);
    const words = element("p", "text");
    words.dir = "auto";
    words.tabIndex = 0;
    if (answer.prefill) {
      const begun = plain("span", "begun", text(answer.prefill));
      begun.title = "begun by the attacker";
      words.append(begun);
    }
    words.append(...plain("span", "", text(answer.response)).childNodes);
    box.append(header, words);
    cover(box);
    return box;
  };
  const item = together => {
    const [first] = together, made = element("li");
    const heading = element("h3", "", text(first.id));
    heading.dir = "auto";
    const group = text(first.group);
    heading.append(element("small", "", `${GROUPS[group] ?? group} · ${text(first.name)}`));
    const asked = element("dl", "asked");
    asked.append(...entry("prompt", text(first.prompt)));
    const boxes = element("div", "answers");
    boxes.append(...together.map(card));
    made.append(heading, asked, boxes);
    return made;
  };
  let matching = 0;
  const show = (count = matching) => {
    matching = count;
    const start = page * PAGE, shown = found.slice(start, start + PAGE), number = n => n.toLocaleString("en");
    const what = beside.checked ? "questions" : "answers";
    const status = !found.length ? "Nothing matches." :
      `${what} ${number(start + 1)}–${number(start + shown.length)} of ${number(found.length)}` +
      (beside.checked ? ` (${number(matching)} matching answers)` : "");
    for (const pager of pagers) {
      pager.status.textContent = status;
      const [first, previous, next, last] = pager.buttons;
      first.disabled = previous.disabled = page === 0;
      next.disabled = last.disabled = page === lastPage();
    }
    pagers[1].bar.hidden = !found.length;
    list.replaceChildren(...shown.map(item));
  };

  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 200);
  });
  for (const input of [model, set, verdict, sort, direction, beside]) input.addEventListener("change", find);
  find();
};

const section = document.getElementById("all-answers");
if (section) {
  /* after the page's first frame; a tab in the background draws none, so not only then */
  new Promise(done => {
    requestAnimationFrame(() => setTimeout(done));
    setTimeout(done, 1000);
  }).then(() => browse(section));
}
