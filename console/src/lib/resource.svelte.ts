/** Data of a screen: loaded, refreshed, and kept while a refresh fails. */

import { ApiError } from "./api";

const RETRY_MS = 3_000;

/**
 * Load what `load` returns, again whenever what it reads changes (the router's query, for one), and every `everyMs`
 * milliseconds while the page is visible. Must be called while a component is set up.
 *
 * `data` is kept while later loads fail; `error` says why the last one did.
 */
export function resource<T>(load: (signal: AbortSignal) => Promise<T>, { everyMs = 0 }: { everyMs?: number } = {}): Resource<T> {
  const found = new Resource<T>(load, everyMs);
  $effect(() => {
    found.start();
    return () => found.stop();
  });
  return found;
}

export class Resource<T> {
  data = $state.raw<T | undefined>(undefined);
  error = $state.raw<Error | null>(null);
  loading = $state(true);
  private abort = new AbortController();
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    private readonly load: (signal: AbortSignal) => Promise<T>,
    private readonly everyMs: number,
  ) {}

  start(): void {
    void this.run();
  }

  stop(): void {
    this.abort.abort();
    clearTimeout(this.timer);
  }

  /** Load again now. */
  async refresh(): Promise<void> {
    this.stop();
    await this.run();
  }

  private async run(): Promise<void> {
    const abort = (this.abort = new AbortController());
    this.loading = true;
    // Called before the first wait, so that the effect sees what `load` reads.
    const pending = this.load(abort.signal);
    try {
      const data = await pending;
      if (abort.signal.aborted) return;
      this.data = data;
      this.error = null;
    } catch (error) {
      if (abort.signal.aborted) return;
      this.error = error as Error;
    }
    this.loading = false;
    const retry = this.error instanceof ApiError && (this.error.unreachable || this.error.status === 503);
    const wait = this.everyMs || (retry ? RETRY_MS : 0);
    if (wait) this.timer = setTimeout(() => this.again(), wait);
  }

  private again(): void {
    if (document.hidden) this.timer = setTimeout(() => this.again(), this.everyMs || RETRY_MS);
    else void this.run();
  }
}
