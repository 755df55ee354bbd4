// Speaks with the coordinator: the login, one request, and the feed that comes back by itself.

const PAGE = "bulkhead-page"; // one half of the session; the other is a cookie that no script can read
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
const SILENCE_MS = 40_000; // the coordinator says something every 15 s

/** An answer that is not what was asked for. `status` is 0 when nobody answered. */
export class Failed extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

export const session = {
  get half() {
    return localStorage.getItem(PAGE) ?? "";
  },
  /** Swap a key for a session; the key is kept nowhere. */
  async open(key) {
    const { page } = await ask("POST", "/dashboard/login", { key });
    localStorage.setItem(PAGE, page);
  },
  async close() {
    await ask("POST", "/dashboard/logout").catch(() => {});
    this.forget();
  },
  forget() {
    localStorage.removeItem(PAGE);
  },
};

async function refusal(response) {
  let sentence = `The coordinator answered ${response.status}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // no sentence of ours
  }
  return new Failed(response.status, sentence);
}

async function send(method, path, body, signal, more = {}) {
  const headers = { ...more, "x-bulkhead-page": session.half };
  if (body) headers["content-type"] = "application/json";
  const options = { method, headers, cache: "no-store", credentials: "same-origin", signal };
  if (body) options.body = JSON.stringify(body);
  try {
    return await fetch(path, options);
  } catch (problem) {
    if (signal?.aborted) throw problem;
    throw new Failed(0, "The coordinator does not answer.");
  }
}

/** One question; the response, or `Failed`. */
export async function fetched(method, path, body) {
  const response = await send(method, path, body, AbortSignal.timeout(30_000));
  if (!response.ok) throw await refusal(response);
  return response;
}

/** One question; its decoded answer, or `Failed`. */
export async function ask(method, path, body = method === "GET" ? null : {}) {
  return (await fetched(method, path, body)).json();
}

/** Reads server-sent events from pieces of text. */
export class Events {
  #rest = "";

  /** Yields {id, name, data} for every event that is complete; comments yield nothing. */
  *take(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: null, name: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon <= 0) continue;
        const value = line.slice(colon + 1).replace(/^ /, "");
        const field = line.slice(0, colon);
        if (field === "id") event.id = value;
        if (field === "event") event.name = value;
        if (field === "data") event.data += value;
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

/** The feed, while the tab is visible. After a break it goes on behind the last event that was seen. */
export class Feed {
  #abort = null;
  #pause = FIRST_PAUSE_MS;
  #timer = 0;
  #on;
  #last = "";
  wanted = false;

  /** @param on {event, open, lost(problem), failed(problem)}: `lost` is tried again, for `failed` that is pointless */
  constructor(on) {
    this.#on = on;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#stop();
      else if (this.wanted) this.start();
    });
    window.addEventListener("offline", () => this.#abort?.abort()); // said at once instead of after a silence
    window.addEventListener("online", () => this.wanted && this.start());
  }

  start() {
    this.#stop();
    this.wanted = true;
    if (!document.hidden) this.#run();
  }

  stop() {
    this.wanted = false;
    this.#last = "";
    this.#stop();
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = null;
  }

  async #run() {
    const abort = (this.#abort = new AbortController());
    try {
      await this.#read(abort);
      throw new Failed(0, "The feed has ended.");
    } catch (problem) {
      if (this.#abort !== abort) return; // stopped, or started anew
      this.#abort = null;
      if (problem.status === 401 || problem.status === 403) {
        this.wanted = false;
        this.#on.failed(problem);
        return;
      }
      this.#on.lost(problem);
      this.#timer = setTimeout(() => this.#run(), this.#pause);
      this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE_MS);
    }
  }

  async #read(abort) {
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await send("GET", "/dashboard/feed", null, abort.signal, this.#last ? { "last-event-id": this.#last } : {});
      if (!response.ok) throw await refusal(response);
      const events = new Events();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        this.#pause = FIRST_PAUSE_MS;
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        this.#on.open();
        for (const event of events.take(value)) {
          if (event.id !== null) this.#last = event.id;
          this.#on.event(event);
        }
      }
    } finally {
      clearTimeout(silence);
    }
  }
}
