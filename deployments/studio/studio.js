// The studio: a story is submitted, its events are followed, and what is shown is what the server has stored.
// A lost connection is taken up by the browser's EventSource, which sends the id of the last event that it had. One
// that the server refuses is closed for good: the story is asked for then, and followed from its beginning.

const $ = (id) => document.getElementById(id);
const isMouse = matchMedia("(pointer: fine)").matches; // else a focused field opens the keyboard
const shown = new Map(); // page number -> its elements and what is known of it
let story = null; // {id, prompt}
let events = null;
let before = Promise.resolve(); // what ends before a page can be changed: the story's own work, or another change
let ended = () => {}; // says that the story's own work is over
let login = null; // while the dialog is open: all that need a key wait for the same one

// A path of the server, or a URL of a reply, as seen from this page: it may be served under a prefix, by Serve or by a
// proxy that the server does not know of.
function here(url) { return `.${url.slice(Math.max(0, url.lastIndexOf("/v1/")))}`; }

async function call(method, path, body) {
  const reply = await fetch(here(path), {
    method,
    headers: body ? { "Content-Type": "application/json" } : {},
    body: body && JSON.stringify(body),
  }).catch(() => { throw new Error("The server cannot be reached."); });
  if (reply.status === 204) return null;
  if (reply.status === 401 && path !== "/login") {
    await logIn();
    return call(method, path, body);
  }
  if (reply.ok) return reply.json();
  const answer = await reply.json().catch(() => ({}));
  throw refusal(answer.error?.message ?? `the server answered ${reply.status}`, reply.status);
}

function refusal(message, status) { return Object.assign(new Error(message), { status }); }

// Until a key is accepted, which the server answers with a cookie. Fails where the dialog is closed without one.
function logIn() {
  login ??= new Promise((resolve, reject) => {
    $("login-error").textContent = "";
    $("login").showModal();
    $("login").onclose = () => { if (!$("login").open) reject(refusal("This server asks for a key.", 401)); };
    $("login-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await call("POST", "/login", { key: $("key").value });
        resolve();
        $("login").close();
      } catch (failure) {
        $("login-error").textContent = failure.message;
      }
    };
  }).finally(() => { login = null; });
  return login;
}

// `isOver`: nothing follows it, so that it fades.
function say(text, { isError = false, isOver = false } = {}) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
  $("status").classList.toggle("over", isOver);
}

async function attempt(work) {
  try {
    await work();
  } catch (failure) {
    say(failure.message, { isError: true });
  }
}

// Exchanges two buttons; the focus stays with what is seen.
function swap(gone, seen) {
  const isFocused = document.activeElement === gone;
  gone.hidden = true;
  seen.hidden = false;
  if (isFocused) seen.focus();
}

// A picture, where there is one, with words under it, to click.
function card(words, picture, act) {
  const item = document.createElement("li"), button = document.createElement("button");
  const text = document.createElement("span");
  button.type = "button";
  button.className = "card";
  if (picture) {
    const image = document.createElement("img");
    image.src = here(picture);
    image.alt = "";
    button.append(image);
  }
  text.textContent = words;
  text.dir = "auto";
  button.append(text);
  button.onclick = () => attempt(act);
  item.append(button);
  return item;
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
  find(".redraw").setAttribute("aria-label", `Draw page ${number} again`);
  find(".adjust").setAttribute("aria-label", `Settings of page ${number}`);
  find(".edit").setAttribute("aria-label", `Edit page ${number}`);
  page.progress.setAttribute("aria-label", `Drawing page ${number}`);
  const forms = [[find(".edit"), find(".change")], [find(".adjust"), find(".again")]];
  const unfold = (opener) => { // or fold, where it is unfolded
    for (const [button, form] of forms) {
      form.hidden = button !== opener || !form.hidden;
      button.setAttribute("aria-expanded", !form.hidden);
      if (!form.hidden) form.querySelector("textarea, input").focus();
    }
  };
  const submit = (form, act) => { form.onsubmit = (event) => { event.preventDefault(); unfold(null); act(); }; };
  for (const [button, form] of forms) {
    const close = () => { unfold(null); button.focus(); };
    form.querySelector(".cancel").onclick = close;
    form.onkeydown = (event) => { if (event.key === "Escape" && !event.isComposing) close(); };
  }
  find(".redraw").onclick = () => alter(page, "POST", "/redraw", {});
  find(".adjust").onclick = (event) => unfold(event.currentTarget);
  find(".edit").onclick = (event) => {
    find(".change textarea").value = page.text.textContent;
    unfold(event.currentTarget);
  };
  submit(find(".change"), () => alter(page, "PATCH", "", { text: find(".change textarea").value }));
  submit(find(".again"), () =>
    alter(page, "POST", "/redraw", values(find(".again"), ["seed", "steps", "guidance_scale", "scheduler", "style"])));
  $("pages-shown").append(element);
  page.stop = stopOf(page);
  shown.set(number, page);
  $("strip").hidden = shown.size < MANY;
  return page;
}

// The strip of a story with many pages: a number, and the picture once it is drawn, which leads to its page.
const MANY = 9;

function stopOf(page) {
  const stop = document.createElement("a"), image = document.createElement("img");
  stop.href = `#page-${page.number}`;
  stop.setAttribute("aria-label", `To page ${page.number}`);
  image.alt = "";
  image.loading = "lazy";
  image.hidden = true;
  stop.append(image, String(page.number));
  stop.onclick = (event) => {
    event.preventDefault(); // a fragment names a story here
    page.element.scrollIntoView({ block: "start" });
    page.element.focus({ preventScroll: true });
  };
  page.element.tabIndex = -1;
  inSight.observe(page.element);
  $("strip").append(stop);
  return stop;
}

// The stop of the page that is read is marked, and in sight itself.
const inSight = new IntersectionObserver((changes) => {
  for (const change of changes) {
    const page = [...shown.values()].find((one) => one.element === change.target);
    if (!page) continue;
    if (change.isIntersecting) page.stop.setAttribute("aria-current", "true");
    else page.stop.removeAttribute("aria-current");
  }
  const current = $("strip").querySelector("[aria-current]");
  if (current) $("strip").scrollTo({ left: current.offsetLeft - $("strip").clientWidth / 2 });
}, { rootMargin: "-30% 0px -60% 0px" });

// Changes a page when it is its turn: the server makes one change of a story at a time.
function alter(page, method, path, body) {
  const asked = story, buttons = page.tools.querySelectorAll("button"), focused = document.activeElement;
  const wait = (text) => {
    say(text);
    page.progress.removeAttribute("value"); // how far it is, is not told here
    page.progress.hidden = false;
  };
  buttons.forEach((button) => { button.disabled = true; });
  wait(`Page ${page.number} is next.`);
  before = before.then(() => attempt(async () => {
    if (story !== asked) return; // another one was opened meanwhile
    wait(`Drawing page ${page.number} ...`);
    try {
      const known = await call(method, `/v1/stories/${asked.id}/pages/${page.number}${path}`, body);
      if (story !== asked) return;
      show(known);
      say(`Page ${page.number} is drawn.`, { isOver: true });
    } finally {
      page.progress.hidden = true;
      buttons.forEach((button) => { button.disabled = false; });
      if (document.activeElement === document.body) focused.focus();
    }
  }));
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
  page.image.src = here(known.variants[known.variant].url);
  page.image.alt = `Picture of page ${known.index}: ${known.text}`;
  const small = page.stop.firstElementChild;
  small.src = page.image.src;
  small.hidden = false;
  page.variants.hidden = known.variants.length < 2;
  page.variants.replaceChildren(...known.variants.map((variant, number) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-pressed", number === known.variant);
    button.setAttribute("aria-label", `Picture ${number + 1}: seed ${variant.seed}, ${variant.steps} steps`);
    button.title = `seed ${variant.seed}, ${variant.steps} steps, guidance ${variant.guidance_scale}, ${variant.scheduler}`;
    image.src = here(variant.url);
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
  done: conclude,
};

// Until the story's own work is over.
function follow() {
  swap($("begin"), $("stop"));
  return new Promise((resolve) => {
    ended = resolve;
    connect();
  });
}

const PAUSE_MS = 1000, MAX_PAUSE_MS = 30_000;

// `pause`: what to wait for after a refusal, until the server is asked again.
function connect(pause = PAUSE_MS) {
  events?.close();
  const source = events = new EventSource(here(`/v1/stories/${story.id}/events`));
  source.addEventListener("open", () => say("Writing ..."));
  source.addEventListener("open", () => {
    pause = PAUSE_MS;
    // What is there is told once more from the beginning: texts start empty, so that none is shown twice.
    shown.forEach((page) => { page.text.textContent = ""; });
  }, { once: true });
  for (const [name, act] of Object.entries(on)) source.addEventListener(name, (event) => act(JSON.parse(event.data)));
  source.addEventListener("error", (event) => {
    if (event.data) source.close(); // the server's own, of a story that failed; the browser's has no data
    if (source.readyState === EventSource.CLOSED) attempt(() => look(source, pause));
    else say("The connection is lost; trying again ...");
  });
}

// What became of the story, which a closed source does not say: it ended, it is gone, a key is needed, or it goes on.
async function look(source, pause) {
  let whole = null;
  try {
    whole = await call("GET", `/v1/stories/${story.id}`);
  } catch (failure) {
    const isFinal = failure.status < 500 && failure.status !== 429; // else the server is away, or asks for patience
    if (isFinal && events === source) leave(failure.message, { isError: true });
  }
  if (events !== source) return; // it was left, or another story was opened meanwhile
  if (whole && whole.status !== "drawing") return conclude(whole);
  say("The connection is lost; trying again ...");
  setTimeout(() => { if (events === source) connect(Math.min(2 * pause, MAX_PAUSE_MS)); }, pause);
}

function conclude(whole) {
  if (whole.status === "failed") finish(whole, `The story broke off: ${whole.error}`, { isError: true });
  else finish(whole, whole.status === "cancelled" ? "Stopped." : "The story is finished.", { isOver: true });
}

function finish(whole, text, options) {
  whole.pages.forEach(show);
  $("after").hidden = false;
  $("read").hidden = !shown.size;
  $("as-html").href = here(`/v1/stories/${whole.id}.html`);
  $("as-epub").href = here(`/v1/stories/${whole.id}.epub`);
  $("as-pdf").href = here(`/v1/stories/${whole.id}.pdf`);
  leave(text, options);
}

// Follows the story no more; what waits for the end of its own work is done now.
function leave(text, options) {
  events?.close();
  events = null;
  swap($("stop"), $("begin"));
  say(text, options);
  ended();
}

function open(id, prompt) {
  story = { id, prompt };
  ended(); // what waits at another story is not done: it sees that this one was opened
  before = Promise.resolve();
  $("go-on").disabled = false;
  shown.clear();
  $("pages-shown").replaceChildren();
  $("strip").replaceChildren();
  $("strip").hidden = true;
  $("title").textContent = prompt;
  document.title = `${prompt} - MiniGPT-5 on Ray`;
  for (const part of ["greeting", "examples", "latest"]) $(part).hidden = true;
  $("story").hidden = false;
  $("after").hidden = true;
  if (location.hash !== `#${id}`) history.pushState(null, "", `#${id}`);
}

window.onpopstate = () => location.reload(); // back to another story, or to the beginning

async function openStored(id) {
  const whole = await call("GET", `/v1/stories/${id}`);
  open(whole.id, whole.prompt);
  if (whole.status === "drawing") before = follow();
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
    const body = values($("ask"),
      ["prompt", "pages", "seed", "steps", "guidance_scale", "scheduler", "style", "temperature"]);
    const [file] = $("picture").files;
    const prompt = body.prompt;
    if (file) body.prompt = [{ type: "text", text: prompt }, { type: "image", image: await dataUrl(file) }];
    const accepted = await call("POST", "/v1/stories", { ...body, wait: false, previews: true });
    open(accepted.id, prompt);
    before = follow();
    if (!isMouse || !$("ask").contains(document.activeElement)) $("story").focus();
  });
};

// Enter asks, as in a chat; with Shift it begins a line. While an input method composes, Enter chooses a word.
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("begin").hidden) $("ask").requestSubmit();
};

$("show-settings").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("show-settings").setAttribute("aria-expanded", !$("settings").hidden);
};

$("skip").onclick = (event) => {
  event.preventDefault(); // a fragment names a story here
  (story ? $("story") : $("prompt")).focus();
};

$("stop").onclick = () => attempt(() => call("POST", `/v1/stories/${story.id}/cancel`));

$("go-on").onclick = () => {
  const asked = story;
  $("go-on").disabled = true;
  before = before.then(() => attempt(async () => {
    if (story !== asked) return;
    try {
      await call("POST", `/v1/stories/${asked.id}/pages`, { count: 1, wait: false });
    } finally {
      $("go-on").disabled = false;
    }
    if (story !== asked) return;
    $("after").hidden = true;
    await follow();
  }));
};

$("print").onclick = () => window.print();

$("share").onclick = () => attempt(async () => {
  const { html, expires } = await call("POST", `/v1/stories/${story.id}/share`, {});
  await navigator.clipboard.writeText(new URL(here(html), location.href).href);
  const until = new Date(1000 * expires).toLocaleString();
  say(`A link to the book is in the clipboard. It is good until ${until}.`, { isOver: true });
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

// Stories that the server has stored

function storyCard(one) {
  const drawn = one.pages.find((page) => page.image);
  return card(one.prompt || "A picture", drawn?.image.url, async () => {
    $("history").close();
    await openStored(one.id);
  });
}

async function list(after) {
  const { data, has_more } = await call("GET", `/v1/stories?limit=20${after ? `&after=${after}` : ""}`);
  if (!after) $("stories").replaceChildren();
  for (const one of data) {
    const item = storyCard(one), remove = document.createElement("button");
    remove.type = "button";
    remove.className = "icon";
    remove.textContent = "\u00d7";
    remove.setAttribute("aria-label", `Delete: ${one.prompt}`);
    remove.onclick = () => attempt(async () => {
      if (!confirm("Delete this story for good?")) return;
      await call("DELETE", `/v1/stories/${one.id}`);
      if (story?.id === one.id) location.assign("./");
      else item.remove();
    });
    item.append(remove);
    $("stories").append(item);
  }
  $("more-stories").hidden = !has_more;
  $("more-stories").onclick = () => attempt(() => list(data.at(-1).id));
}

$("show-history").onclick = () => { $("history").showModal(); attempt(() => list()); };
$("close-history").onclick = () => $("history").close();
$("history").onclick = (event) => { if (event.target === $("history")) $("history").close(); }; // beside it

// The beginning

function describe(model) {
  for (const [field, names] of [["scheduler", model.schedulers], ["style", model.styles]]) {
    for (const select of [$(field), $("page").content.querySelector(`[name=${field}]`)]) {
      for (const name of names) select.add(new Option(name));
      select.parentElement.hidden = !names.length;
    }
  }
  $("steps").placeholder = model.defaults.steps;
  $("guidance").placeholder = model.defaults.guidance_scale;
  $("temperature").placeholder = model.defaults.temperature;
  $("pages").max = model.max_pages;
  const [summary, ...details] = model.about.split("\n");
  $("model").textContent = model.id;
  $("summary").textContent = summary;
  $("about").textContent = details.join("\n");
  $("more-about").hidden = !details.length;
  if (model.examples.length) $("prompt").placeholder = model.examples[0].prompt;
}

async function greet(model) {
  $("examples").querySelector("ul").replaceChildren(...model.examples.map(({ prompt, picture }) =>
    card(prompt, picture, () => {
      $("prompt").value = prompt;
      $("ask").requestSubmit();
    })));
  $("greeting").hidden = false;
  $("examples").hidden = !model.examples.length;
  if (isMouse) $("prompt").focus();
  const { data } = await call("GET", "/v1/stories?limit=6");
  $("latest").querySelector("ul").replaceChildren(...data.map(storyCard));
  $("latest").hidden = !data.length || story !== null; // one may have been asked for meanwhile
}

attempt(async () => {
  const { data: [model] } = await call("GET", "/v1/models");
  describe(model);
  const id = location.hash.slice(1);
  if (!id) return greet(model);
  try {
    await openStored(id);
  } catch (failure) { // it was deleted, say
    await greet(model);
    throw failure;
  }
});
