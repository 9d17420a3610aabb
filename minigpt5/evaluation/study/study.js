"use strict";
// One rater's way through a study. Texts enter the page as text alone; nothing is fetched and nothing is sent.
const data = JSON.parse(document.getElementById("data").textContent);
const TIE = "tie";
const find = (id) => document.getElementById(id);
const make = (tag, fields, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
let rater = "", plan = [], at = 0, answers = {};

// Numbers in [0, 1) that depend on a text alone (FNV-1a, then mulberry32): a rater's order outlives a closed page.
function randomOf(text) {
  let state = 2166136261;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function planFor(name) {
  const random = randomOf(`${data.study} ${name}`);
  const steps = data.comparisons.map((one) => ({
    id: one.id, prompt: one.prompt, sides: random() < 0.5 ? one.stories : [one.stories[1], one.stories[0]],
  }));
  for (let last = steps.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [steps[last], steps[other]] = [steps[other], steps[last]];
  }
  return steps;
}

const place = () => `minigpt5-study ${data.study} ${rater}`;
function keep() {
  try {
    localStorage.setItem(place(), JSON.stringify(answers));
  } catch {
    find("status").textContent = "This browser keeps no answers: finish in one sitting, or download them before you leave.";
  }
}
function kept() {
  try {
    return JSON.parse(localStorage.getItem(place())) ?? {};
  } catch {
    return {};
  }
}

// A second tab may have added some.
function takeKept() {
  answers = { ...answers, ...kept() };
}

const isAnswered = (step) => data.questions.every((one) => answers[step.id]?.[one.id]);

function showOnly(id) {
  for (const name of ["start", "compare", "end"]) find(name).hidden = name !== id;
  find(id).querySelector("[tabindex]").focus();
  scrollTo(0, 0);
}

function showStory(side, name) {
  find(side).replaceChildren(...data.stories[name].map((page, index) => {
    const picture = page.picture
      ? make("img", { src: data.pictures[page.picture], alt: `Picture of page ${index + 1}, ${side} story` })
      : make("div", { className: "missing", textContent: "No picture" });
    return make("div", { className: "page" }, picture, make("p", { textContent: page.text, dir: "auto" }));
  }));
}

function choice(question, step, value, label) {
  const input = make("input", { type: "radio", name: question.id, value, required: true });
  input.checked = answers[step.id]?.[question.id] === value;
  input.addEventListener("change", () => {
    takeKept();
    answers[step.id] = { ...answers[step.id], [question.id]: value };
    find("status").textContent = "";
    keep();
    showProgress();
  });
  return make("label", {}, input, label);
}

function showProgress() {
  const done = plan.filter(isAnswered).length;
  Object.assign(find("progress"), { max: plan.length, value: done });
  find("place").textContent = `Pair ${at + 1} of ${plan.length} (${done} answered)`;
}

function show() {
  const step = plan[at];
  find("prompt").textContent = step.prompt;
  showStory("left", step.sides[0]);
  showStory("right", step.sides[1]);
  find("fields").replaceChildren(...data.questions.map((question) => make("fieldset", {},
    make("legend", { textContent: question.name }),
    make("p", { textContent: question.text }),
    make("div", { className: "choices" },
      choice(question, step, step.sides[0], "Left"),
      choice(question, step, TIE, "About the same"),
      choice(question, step, step.sides[1], "Right")))));
  find("back").disabled = at === 0;
  find("status").textContent = "";
  showProgress();
  showOnly("compare");
}

function next() {
  if (!isAnswered(plan[at])) {
    find("status").textContent = "Please answer each question first.";
    return;
  }
  const open = plan.findIndex((step, index) => index > at && !isAnswered(step));
  if (at + 1 < plan.length) at += 1;
  else if (plan.every(isAnswered)) return showOnly("end");
  else at = open >= 0 ? open : plan.findIndex((step) => !isAnswered(step));
  show();
}

function back() {
  if (at > 0) {
    at -= 1;
    show();
  }
}

function download() {
  takeKept();
  const content = {
    format: data.format, study: data.study, rater,
    answers: plan.filter((step) => answers[step.id]).map((step) => (
      { comparison: step.id, left: step.sides[0], right: step.sides[1], choices: answers[step.id] })),
  };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  const name = rater.replace(/[^\p{L}\p{N}_-]+/gu, "-");
  make("a", { href: url, download: `answers-${data.study}-${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

find("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = find("rater").value.trim().normalize();
  if (!rater) return;
  plan = planFor(rater);
  answers = kept();
  at = plan.findIndex((step) => !isAnswered(step));
  if (at >= 0) return show();
  at = 0;
  showOnly("end");
});
find("questions").noValidate = true; // the status says what is missing
find("questions").addEventListener("submit", (event) => { event.preventDefault(); next(); });
find("back").addEventListener("click", back);
find("review").addEventListener("click", () => { at = 0; show(); });
find("save").addEventListener("click", download);
find("download").addEventListener("click", download);

document.addEventListener("keydown", (event) => {
  if (find("compare").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "Backspace") {
    event.preventDefault();
    return back();
  }
  if (event.key === "Enter" && document.activeElement.tagName !== "BUTTON") {
    event.preventDefault();
    return next();
  }
  const chosen = ["1", "2", "3"].indexOf(event.key);
  if (chosen < 0) return;
  // The question with the focus, else the first without an answer.
  const fields = [...find("fields").children];
  const focused = fields.findIndex((field) => field.contains(document.activeElement));
  const number = focused >= 0 ? focused : fields.findIndex((field) => !field.querySelector(":checked"));
  if (number < 0) return;
  fields[number].querySelectorAll("input")[chosen].click();
  const after = fields[number + 1];
  (after ? after.querySelector(":checked") ?? after.querySelector("input") : find("next")).focus({ preventScroll: true });
});

find("total").textContent = data.comparisons.length;
find("rater").focus();
