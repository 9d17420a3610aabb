// The studio's own file in node, with as much of a browser as it uses. No clock runs: `pass` ends its pauses.

import { readFileSync } from "node:fs";
import vm from "node:vm";

const SOURCE = readFileSync(new URL("../../deployments/studio/studio.js", import.meta.url), "utf8");
const MODEL = { id: "m", about: "", examples: [], schedulers: [], styles: [], max_pages: 64, defaults: {} };
const BUTTONS = [".redraw", ".adjust", ".edit"];

class Element {
  hidden = false;
  disabled = false;
  open = false;
  textContent = "";
  value = "";
  elements = {};
  classList = { add() {}, remove() {}, toggle() {} };
  #parts;
  constructor(parts = new Map()) { this.#parts = parts; }
  querySelector(selector) {
    if (!this.#parts.has(selector)) this.#parts.set(selector, new Element(this.#parts));
    return this.#parts.get(selector);
  }
  querySelectorAll() { return BUTTONS.map((selector) => this.querySelector(selector)); }
  cloneNode() { return { firstElementChild: new Element() }; }
  get content() { return this; }
  get parentElement() { return new Element(); }
  get firstElementChild() { return this.querySelector("first"); }
  showModal() { this.open = true; }
  close() {
    this.open = false;
    this.onclose?.();
  }
}
for (const name of ["add", "append", "contains", "focus", "removeAttribute", "replaceChildren", "setAttribute"])
  Element.prototype[name] = () => {};

// The studio at the address of `story_1`. `answer(call)`: status and body for a call such as "GET /v1/models", or null
// where that is the one of a server on which the story is being drawn. It throws where there is no server.
export async function openStudio(answer = () => null) {
  const elements = new Map(), sources = [], pauses = [], calls = [];

  class EventSource {
    static CLOSED = 2;
    readyState = 0;
    #heard = new Map();
    constructor() { sources.push(this); }
    addEventListener(name, act, { once = false } = {}) {
      this.#heard.set(name, [...this.#heard.get(name) ?? [], { act, once }]);
    }
    close() { this.readyState = 2; }
    #fire(name, event) {
      const heard = this.#heard.get(name) ?? [];
      this.#heard.set(name, heard.filter(({ once }) => !once));
      heard.forEach(({ act }) => act(event));
    }
    tell(name, data) {
      if (this.readyState === 0) {
        this.readyState = 1;
        this.#fire("open", {});
      }
      this.#fire(name, { data: JSON.stringify(data) });
      return settle();
    }
    refuse() { // as every reply but 200 does
      this.readyState = 2;
      this.#fire("error", {});
      return settle();
    }
  }

  const get = (id) => {
    if (!elements.has(id)) elements.set(id, new Element());
    return elements.get(id);
  };
  const usual = (call) => {
    if (call === "GET /v1/models") return [200, { data: [MODEL] }];
    const story = { id: "story_1", prompt: "A fox", status: "drawing", pages: [] };
    if (call === "GET /v1/stories/story_1") return [200, story];
    return [200, { index: 1, text: "Once", image: null }];
  };
  const context = vm.createContext({
    EventSource,
    IntersectionObserver: class { observe() {} },
    Option: class {},
    document: { getElementById: get, createElement: () => new Element(), activeElement: new Element(), body: {} },
    fetch: async (path, { method }) => {
      const call = `${method} ${path.slice(1)}`; // they begin with a dot
      calls.push(call);
      const [status, body] = answer(call) ?? usual(call);
      return { status, ok: status < 300, json: async () => body };
    },
    history: { pushState() {} },
    location: { hash: "#story_1" },
    matchMedia: () => ({ matches: false }),
    setTimeout: (act, pause) => pauses.push({ act, pause }),
    window: {},
  });
  vm.runInContext(SOURCE, context);
  await settle();

  return {
    get, sources, calls,
    pauses: () => pauses.map(({ pause }) => pause),
    status: () => get("status").textContent,
    button: (number, name) => vm.runInContext("shown", context).get(number).element.querySelector(`.${name}`),
    openStory: async (id) => {
      vm.runInContext(`attempt(() => openStored("${id}"))`, context);
      await settle();
    },
    click: async (element) => {
      if (!element.disabled) element.onclick({ currentTarget: element });
      await settle();
    },
    pass: async () => {
      pauses.splice(0).forEach(({ act }) => act());
      await settle();
    },
  };
}

// What is no clock and no network has ended.
export function settle() { return new Promise((resolve) => { setImmediate(resolve); }); }
