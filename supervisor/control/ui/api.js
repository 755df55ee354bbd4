// Speaks with the supervisor: the login, one request, and streams that come back by themselves.

const KEY = "bulkhead-session";
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
const SILENCE_MS = 40_000; // the supervisor says something every 15 s

/** An answer that is not what was asked for. `status` is 0 when nobody answered. */
export class Failed extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

export const session = {
  get token() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  /** Swap the code behind the `#` for a token. The code leaves the address at once, and it works only once. */
  async open() {
    const code = new URLSearchParams(location.hash.slice(1)).get("c");
    if (!code) return;
    history.replaceState(null, "", location.pathname);
    const { token } = await ask("POST", "/v1/session", { code });
    sessionStorage.setItem(KEY, token);
  },
  forget() {
    sessionStorage.removeItem(KEY);
  },
};

function headers(body) {
  const found = {};
  if (session.token) found.Authorization = `Bearer ${session.token}`;
  if (body) found["Content-Type"] = "application/json";
  return found;
}

async function refusal(response) {
  let sentence = `The supervisor answered ${response.status}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // no sentence of ours
  }
  return new Failed(response.status, sentence);
}

async function send(method, path, body, signal) {
  const options = { method, headers: headers(body), cache: "no-store", signal };
  if (body) options.body = JSON.stringify(body);
  try {
    return await fetch(path, options);
  } catch (problem) {
    if (signal?.aborted) throw problem;
    throw new Failed(0, "The supervisor does not answer.");
  }
}

/** One question; its decoded answer, or `Failed`. */
export async function ask(method, path, body = method === "GET" ? null : {}) {
  const response = await send(method, path, body, AbortSignal.timeout(15_000));
  if (!response.ok) throw await refusal(response);
  return response.json();
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

/**
 * A stream that lives while the tab is visible: browsers allow six connections to a host, all tabs together.
 * After a break it goes on behind the last event that was seen.
 */
export class Stream {
  #abort = null;
  #pause = FIRST_PAUSE_MS;
  #timer = 0;
  #on;
  #path;
  last = null;

  /**
   * @param path of the last event's id to the path that goes on from there
   * @param on {event, open, lost(problem), failed(problem)}: `lost` is tried again, for `failed` that is pointless
   */
  constructor(path, on) {
    this.#path = path;
    this.#on = on;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#stop();
      else if (this.wanted) this.start();
    });
  }

  wanted = false;

  start() {
    this.#stop();
    this.wanted = true;
    if (!document.hidden) this.#run();
  }

  stop() {
    this.wanted = false;
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
      throw new Failed(0, "The stream has ended.");
    } catch (problem) {
      if (this.#abort !== abort) return; // stopped, or started anew
      this.#abort = null;
      if (problem.status >= 400 && problem.status < 500) {
        this.wanted = false;
        this.#on.failed?.(problem);
        return;
      }
      this.#on.lost?.(problem);
      this.#timer = setTimeout(() => this.#run(), this.#pause);
      this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE_MS);
    }
  }

  async #read(abort) {
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await send("GET", this.#path(this.last), null, abort.signal);
      if (!response.ok) throw await refusal(response);
      this.#on.open?.();
      const events = new Events();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        this.#pause = FIRST_PAUSE_MS;
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        for (const event of events.take(value)) {
          if (event.id !== null) this.last = event.id;
          this.#on.event(event);
        }
      }
    } finally {
      clearTimeout(silence);
    }
  }
}
