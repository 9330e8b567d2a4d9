/** Server-sent events over fetch: reconnects with `Last-Event-ID`, and says when it does. */

import { ApiError, errorOf } from "./api";
import { session } from "./session.svelte";

export interface ServerEvent {
  event: string;
  data: string;
  id: string;
}

export type StreamState = "connecting" | "open" | "reconnecting" | "closed";

export interface StreamOptions {
  onEvent: (event: ServerEvent) => void;
  onState?: (state: StreamState) => void;
  /** Called for an answer that a retry does not change (403, 404); the stream is closed then. */
  onError?: (error: ApiError) => void;
  /** Id of the last event that was seen before, to continue after it. */
  lastEventId?: string;
  /** Milliseconds without a byte after which the connection counts as lost; 0: never. */
  silenceMs?: number;
}

const FIRST_WAIT_MS = 500;
const MAX_WAIT_MS = 10_000;
const FINAL = new Set([400, 401, 403, 404, 405, 410]);

/** Follow a stream until the returned function is called, or the server says that it has ended (status 204, or `final` returns true). */
export function follow(url: string, options: StreamOptions): () => void {
  const stopped = new AbortController();
  void run(url, options, stopped.signal);
  return () => stopped.abort();
}

async function run(url: string, options: StreamOptions, stopped: AbortSignal): Promise<void> {
  let last = options.lastEventId ?? "";
  let wait = FIRST_WAIT_MS;
  const enter = (next: StreamState): void => {
    if (!stopped.aborted) options.onState?.(next);
  };
  enter("connecting");
  while (!stopped.aborted) {
    const attempt = new AbortController();
    const end = (): void => attempt.abort();
    stopped.addEventListener("abort", end);
    let silence: ReturnType<typeof setTimeout> | undefined;
    const alive = (): void => {
      clearTimeout(silence);
      if (options.silenceMs) silence = setTimeout(end, options.silenceMs);
    };
    try {
      alive();
      const headers: Record<string, string> = { accept: "text/event-stream" };
      if (last) headers["last-event-id"] = last;
      const response = await fetch(url, { headers, signal: attempt.signal, credentials: "same-origin" });
      if (response.status === 204) break;
      if (!response.ok || !response.body) {
        const error = await errorOf(response);
        if (FINAL.has(error.status)) {
          if (error.status === 401) session.ended(error.message);
          options.onError?.(error);
          break;
        }
        throw error;
      }
      enter("open");
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new EventParser((event) => {
        if (event.id) last = event.id;
        if (!stopped.aborted) options.onEvent(event);
      });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        alive();
        wait = FIRST_WAIT_MS;
        parser.feed(value);
      }
    } catch {
      // A lost connection: the next round tries again.
    } finally {
      clearTimeout(silence);
      stopped.removeEventListener("abort", end);
    }
    if (stopped.aborted) break;
    enter("reconnecting");
    await pause(wait * (0.75 + Math.random() / 2), stopped);
    wait = Math.min(wait * 2, MAX_WAIT_MS);
  }
  enter("closed");
}

function pause(ms: number, stopped: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    stopped.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Takes the text of a stream in pieces, and calls `emit` for each whole event. */
export class EventParser {
  private rest = "";
  private event = "";
  private data: string[] = [];
  private id = "";

  constructor(
    private readonly emit: (event: ServerEvent) => void,
    private readonly onComment?: (text: string) => void,
  ) {}

  feed(text: string): void {
    const lines = (this.rest + text).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop()!;
    for (const line of lines) this.line(line);
  }

  private line(line: string): void {
    if (line === "") {
      if (this.data.length) this.emit({ event: this.event || "message", data: this.data.join("\n"), id: this.id });
      this.event = "";
      this.data = [];
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) {
      this.onComment?.(line.slice(1).trim());
      return;
    }
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") this.event = value;
    else if (name === "data") this.data.push(value);
    else if (name === "id") this.id = value;
  }
}
