// The studio: a story is submitted, its events are followed, and what is shown is what the server has stored.
// A lost connection is taken up by the browser's EventSource, which sends the id of the last event that it had.

const $ = (id) => document.getElementById(id);
const shown = new Map(); // page number -> its elements and what is known of it
let story = null; // {id, prompt}
let events = null;

async function call(method, path, body) {
  const reply = await fetch(path, {
    method,
    headers: body ? { "Content-Type": "application/json" } : {},
    body: body && JSON.stringify(body),
  });
  if (reply.status === 204) return null;
  if (reply.status === 401 && path !== "/login") {
    await logIn();
    return call(method, path, body);
  }
  const answer = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(answer.error?.message ?? `the server answered ${reply.status}`);
  return answer;
}

// Until a key is accepted, which the server answers with a cookie.
function logIn() {
  return new Promise((resolve) => {
    if (!$("login").open) $("login").showModal();
    $("login-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await call("POST", "/login", { key: $("key").value });
        $("login").close();
        resolve();
      } catch (failure) {
        $("login-error").textContent = failure.message;
      }
    };
  });
}

function say(text, { isError = false } = {}) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function attempt(work) {
  try {
    await work();
  } catch (failure) {
    say(failure.message === "Failed to fetch" ? "The server cannot be reached." : failure.message, { isError: true });
  }
}

// What a form says, without what was left empty.
function values(form, names) {
  const found = {};
  for (const name of names) {
    const field = form.elements[name];
    if (field.value !== "") found[name] = field.type === "number" ? Number(field.value) : field.value;
  }
  return found;
}

// Pages

function pageOf(number) {
  if (shown.has(number)) return shown.get(number);
  const element = $("page").content.cloneNode(true).firstElementChild;
  const find = (selector) => element.querySelector(selector);
  const page = {
    number, element, text: find(".text"), image: find("figure > img"), progress: find("progress"),
    missing: find(".missing"), variants: find(".variants"), tools: find(".tools"), known: null,
  };
  element.setAttribute("aria-label", `Page ${number}`);
  find(".number").textContent = number;
  find(".edit").setAttribute("aria-label", `Edit page ${number}`);
  find(".redraw").setAttribute("aria-label", `Redraw page ${number}`);
  page.progress.setAttribute("aria-label", `Drawing page ${number}`);
  const change = find(".change"), again = find(".again");
  const open = (form) => { change.hidden = form !== change; again.hidden = form !== again; };
  find(".edit").onclick = () => { open(change); change.querySelector("textarea").value = page.text.textContent;
    change.querySelector("textarea").focus(); };
  find(".redraw").onclick = () => { open(again); again.elements.seed.focus(); };
  element.querySelectorAll(".cancel").forEach((button) => { button.onclick = () => open(null); });
  change.onsubmit = (event) => { event.preventDefault(); open(null);
    alter(page, "PATCH", "", { text: change.querySelector("textarea").value }); };
  again.onsubmit = (event) => { event.preventDefault(); open(null);
    alter(page, "POST", "/redraw", values(again, ["seed", "steps", "guidance_scale", "scheduler"])); };
  $("pages-shown").append(element);
  shown.set(number, page);
  return page;
}

function alter(page, method, path, body) {
  return attempt(async () => {
    say(`Drawing page ${page.number} ...`);
    page.progress.removeAttribute("value"); // how far it is, is not told here
    page.progress.hidden = false;
    try {
      show(await call(method, `/v1/stories/${story.id}/pages/${page.number}${path}`, body));
      say(`Page ${page.number} is drawn.`);
    } finally {
      page.progress.hidden = true;
    }
  });
}

// A page as the server tells it.
function show(known) {
  const page = pageOf(known.index);
  page.known = known;
  page.text.textContent = known.text;
  page.text.classList.remove("arriving");
  page.progress.hidden = true;
  page.tools.hidden = false;
  page.missing.hidden = !known.error;
  page.missing.textContent = known.error ? `There is no picture: ${known.error}` : "";
  page.image.hidden = !known.image;
  if (!known.image) return;
  page.image.classList.remove("coarse");
  page.image.src = known.variants[known.variant].url;
  page.image.alt = `Picture of page ${known.index}: ${known.text}`;
  page.variants.hidden = known.variants.length < 2;
  page.variants.replaceChildren(...known.variants.map((variant, number) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-pressed", number === known.variant);
    button.setAttribute("aria-label", `Picture ${number + 1}: seed ${variant.seed}, ${variant.steps} steps`);
    button.title = `seed ${variant.seed}, ${variant.steps} steps, guidance ${variant.guidance_scale}, ${variant.scheduler}`;
    image.src = variant.url;
    image.alt = "";
    button.append(image);
    button.onclick = () => attempt(async () =>
      show(await call("PATCH", `/v1/stories/${story.id}/pages/${known.index}`, { variant: number })));
    return button;
  }));
}

// Events

const on = {
  text({ page, delta }) {
    const { text } = pageOf(page);
    text.classList.add("arriving");
    text.textContent += delta;
  },
  restart({ page }) { pageOf(page).text.textContent = ""; },
  slot({ page: number }) {
    const page = pageOf(number);
    page.text.classList.remove("arriving");
    if (page.known?.image) return;
    page.progress.hidden = false;
    say(`Drawing page ${number} ...`);
  },
  progress({ page: number, step, steps, preview }) {
    const page = pageOf(number);
    page.progress.hidden = false;
    page.progress.value = step / steps;
    if (preview) {
      page.image.src = `data:image/jpeg;base64,${preview}`;
      page.image.alt = `Page ${number}, still being drawn`;
      page.image.classList.add("coarse");
      page.image.hidden = false;
    }
  },
  page: show,
  done(whole) { finish(whole, whole.status === "cancelled" ? "Stopped." : "The story is finished."); },
};

function follow() {
  events?.close();
  // What is there is told once more from the beginning: texts start empty, so that none is shown twice.
  shown.forEach((page) => { page.text.textContent = ""; });
  events = new EventSource(`/v1/stories/${story.id}/events`);
  for (const [name, act] of Object.entries(on)) events.addEventListener(name, (event) => act(JSON.parse(event.data)));
  // The server's own `error` event has data; the browser's, of a lost connection, has none.
  events.addEventListener("error", (event) => {
    if (event.data) attempt(async () => {
      const { error } = JSON.parse(event.data);
      finish(await call("GET", `/v1/stories/${story.id}`), `The story broke off: ${error.message}`, { isError: true });
    });
    else if (events.readyState === EventSource.CLOSED) { // refused for good: look whether it is there still
      setTimeout(() => story && attempt(follow), 2000);
    } else say("The connection is lost; trying again ...");
  });
  $("stop").hidden = false;
  $("begin").disabled = true;
}

function finish(whole, text, options) {
  events?.close();
  events = null;
  whole.pages.forEach(show);
  $("stop").hidden = true;
  $("begin").disabled = false;
  $("after").hidden = false;
  $("as-html").href = `/v1/stories/${whole.id}.html`;
  $("as-epub").href = `/v1/stories/${whole.id}.epub`;
  $("as-pdf").href = `/v1/stories/${whole.id}.pdf`;
  say(text, options);
}

function open(id, prompt) {
  story = { id, prompt };
  shown.clear();
  $("pages-shown").replaceChildren();
  $("title").textContent = prompt;
  $("story").hidden = false;
  $("after").hidden = true;
  history.replaceState(null, "", `#${id}`);
}

async function openStored(id) {
  const whole = await call("GET", `/v1/stories/${id}`);
  open(whole.id, whole.prompt);
  if (whole.status === "drawing") follow();
  else finish(whole, whole.error ?? "");
  $("story").focus();
}

// Asking

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  attempt(async () => {
    say("Asking ...");
    const body = values($("ask"), ["prompt", "pages", "seed", "steps", "guidance_scale", "scheduler", "temperature"]);
    const [file] = $("picture").files;
    const prompt = body.prompt;
    if (file) body.prompt = [{ type: "text", text: prompt }, { type: "image", image: await dataUrl(file) }];
    const accepted = await call("POST", "/v1/stories", { ...body, wait: false, previews: true });
    open(accepted.id, prompt);
    say("Writing ...");
    follow();
  });
};

$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
};

$("stop").onclick = () => attempt(() => call("POST", `/v1/stories/${story.id}/cancel`));

$("go-on").onclick = () => attempt(async () => {
  await call("POST", `/v1/stories/${story.id}/pages`, { count: 1, wait: false });
  $("after").hidden = true;
  follow();
});

$("print").onclick = () => window.print();

$("share").onclick = () => attempt(async () => {
  const { html, expires } = await call("POST", `/v1/stories/${story.id}/share`, {});
  await navigator.clipboard.writeText(new URL(html, location.href).href);
  say(`A link to the book is in the clipboard. It is good until ${new Date(1000 * expires).toLocaleString()}.`);
});

// The book

let leaf = 0;

function turn(to) {
  const pages = [...shown.values()];
  leaf = Math.max(0, Math.min(pages.length - 1, to));
  const page = pages[leaf];
  $("book-picture").src = page.image.src;
  $("book-picture").alt = page.image.alt;
  $("book-picture").hidden = page.image.hidden;
  $("book-text").textContent = page.text.textContent;
  $("book-page").textContent = `${leaf + 1} of ${pages.length}`;
  $("back").disabled = leaf === 0;
  $("on").disabled = leaf === pages.length - 1;
}

$("read").onclick = () => { turn(0); $("book").showModal(); };
$("back").onclick = () => turn(leaf - 1);
$("on").onclick = () => turn(leaf + 1);
$("close-book").onclick = () => $("book").close();
$("book").onkeydown = (event) => {
  if (event.key === "ArrowRight") turn(leaf + 1);
  if (event.key === "ArrowLeft") turn(leaf - 1);
};

// History

async function list(after) {
  const { data, has_more } = await call("GET", `/v1/stories?limit=20${after ? `&after=${after}` : ""}`);
  if (!after) $("stories").replaceChildren();
  for (const one of data) {
    const item = document.createElement("li"), button = document.createElement("button");
    const remove = document.createElement("button"), words = document.createElement("span");
    button.type = remove.type = "button";
    button.className = "open";
    const drawn = one.pages.find((page) => page.image);
    if (drawn) {
      const image = document.createElement("img");
      image.src = drawn.image.url;
      image.alt = "";
      button.append(image);
    }
    words.textContent = one.prompt || "A picture";
    button.append(words);
    button.onclick = () => attempt(async () => { toggleHistory(); await openStored(one.id); });
    remove.textContent = "\u00d7";
    remove.setAttribute("aria-label", `Delete: ${one.prompt}`);
    remove.onclick = () => attempt(async () => {
      if (!confirm("Delete this story for good?")) return;
      await call("DELETE", `/v1/stories/${one.id}`);
      item.remove();
    });
    item.append(button, remove);
    $("stories").append(item);
  }
  $("more-stories").hidden = !has_more;
  $("more-stories").onclick = () => attempt(() => list(data.at(-1).id));
}

function toggleHistory() {
  $("history").hidden = !$("history").hidden;
  $("show-history").setAttribute("aria-expanded", !$("history").hidden);
}

$("show-history").onclick = () => { toggleHistory(); if (!$("history").hidden) attempt(() => list()); };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("history").hidden) { toggleHistory(); $("show-history").focus(); }
});

attempt(async () => {
  const { data: [model] } = await call("GET", "/v1/models");
  for (const name of model.schedulers) {
    $("scheduler").add(new Option(name));
    $("page").content.querySelector("[name=scheduler]").add(new Option(name));
  }
  $("steps").placeholder = model.defaults.steps;
  $("guidance").placeholder = model.defaults.guidance_scale;
  $("temperature").placeholder = model.defaults.temperature;
  $("pages").max = model.max_pages;
  if (location.hash.length > 1) await openStored(location.hash.slice(1));
});
