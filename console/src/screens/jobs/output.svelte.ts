/** The text that a job streams. It survives a reload: the browser's tab keeps the text and the id of the last event. */

import { follow, type ServerEvent, type StreamState } from "../../lib/events";

const PIECE_CHARS = 16_384;
const MAX_KEPT_CHARS = 1_000_000;

interface Delta {
  choices?: { delta?: { content?: string | null; reasoning_content?: string | null }; text?: string }[];
}

export class LiveOutput {
  state = $state<StreamState>("connecting");
  progress = $state<number | null>(null);
  preview = $state<string | null>(null);
  pieces = $state(0);
  hasText = $state(false);
  private text = "";
  private pending = "";
  private frame = 0;
  private last = "";
  private area: HTMLElement | null = null;
  private readonly stop: () => void;

  constructor(
    private readonly job: string,
    private readonly onChange: () => void,
  ) {
    this.restore();
    this.stop = follow(`/v1/jobs/${job}/events`, {
      lastEventId: this.last,
      onEvent: (event) => this.take(event),
      onState: (state) => (this.state = state),
    });
    addEventListener("pagehide", this.keep);
  }

  close(): void {
    this.stop();
    this.keep();
    removeEventListener("pagehide", this.keep);
    cancelAnimationFrame(this.frame);
  }

  /** Draw the text into an element, and what comes later: a node per piece, so that the browser lays out the last one only. */
  draw = (area: HTMLElement): (() => void) => {
    this.area = area;
    area.replaceChildren();
    this.append(this.text);
    return () => (this.area = null);
  };

  private take(event: ServerEvent): void {
    this.last = event.id || this.last;
    if (event.event === "job.chunk") {
      this.add(textOf(event.data));
      return;
    }
    if (event.event === "job.progress") {
      const progress = JSON.parse(event.data) as { fraction?: number | null; preview?: string | null };
      this.progress = progress.fraction ?? null;
      this.preview = progress.preview ?? this.preview;
      return;
    }
    if (event.event === "job.restarted") this.clear();
    this.onChange();
  }

  private add(text: string): void {
    if (!text) return;
    this.pieces += 1;
    this.hasText = true;
    this.pending += text;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.flush());
  }

  private flush(): void {
    this.frame = 0;
    const text = this.pending;
    this.pending = "";
    this.text += text;
    this.append(text);
  }

  private append(text: string): void {
    if (!this.area) return;
    const atEnd = this.area.scrollTop + this.area.clientHeight >= this.area.scrollHeight - 40;
    for (let at = 0; at < text.length; ) {
      let node = this.area.lastElementChild;
      if (!node || node.textContent!.length >= PIECE_CHARS) {
        node = document.createElement("span");
        node.append("");
        this.area.append(node);
      }
      const part = text.slice(at, at + PIECE_CHARS);
      (node.firstChild as Text).appendData(part);
      at += part.length;
    }
    if (atEnd) this.area.scrollTop = this.area.scrollHeight;
  }

  private clear(): void {
    this.text = this.pending = "";
    this.pieces = 0;
    this.hasText = false;
    this.area?.replaceChildren();
  }

  private readonly keep = (): void => {
    const text = this.text + this.pending;
    try {
      if (text && text.length <= MAX_KEPT_CHARS) {
        sessionStorage.setItem(`job.${this.job}`, JSON.stringify({ last: this.last, text, pieces: this.pieces }));
      }
    } catch {
      // The storage is full: the events come again from the first one.
    }
  };

  private restore(): void {
    try {
      const kept = JSON.parse(sessionStorage.getItem(`job.${this.job}`) ?? "null") as { last: string; text: string; pieces: number } | null;
      if (!kept) return;
      this.last = kept.last;
      this.text = kept.text;
      this.pieces = kept.pieces;
      this.hasText = true;
    } catch {
      // Nothing usable is kept.
    }
  }
}

function textOf(data: string): string {
  if (data === "[DONE]") return "";
  try {
    const chunk = JSON.parse(data) as Delta;
    return (chunk.choices ?? []).map((one) => one.delta?.content ?? one.delta?.reasoning_content ?? one.text ?? "").join("");
  } catch {
    return "";
  }
}
