/** One request of the playground: whether it waits or runs, its result, its error, and how to stop it. */

import { ApiError, get, post } from "../../lib/api";
import { type Call, type Job, sendCall, submitJob } from "../../lib/catalog";
import { follow } from "../../lib/events";
import { FormState } from "../../lib/form.svelte";
import { toasts } from "../../lib/toasts.svelte";
import { strings } from "../../strings";

const POLL_MS = 2_000;
const ENDS = new Set(["job.completed", "job.failed", "job.cancelled", "job.expired"]);

export interface Progress {
  fraction?: number | null;
  step?: number | null;
  steps?: number | null;
  phase?: string;
  message?: string | null;
  preview?: string | null;
}

export class Run {
  busy = $state(false);
  /** What is happening now, for people. */
  status = $state("");
  progress = $state.raw<Progress | null>(null);
  readonly form: FormState;
  private abort = new AbortController();

  constructor(fields: () => string[]) {
    this.form = new FormState(fields);
  }

  /** Return what `work` returns; undefined if it failed or was stopped. */
  async start<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T | undefined> {
    this.stop();
    const abort = (this.abort = new AbortController());
    this.busy = true;
    this.status = strings.playground.running;
    this.progress = null;
    this.form.clear();
    try {
      return await work(abort.signal);
    } catch (error) {
      if (!abort.signal.aborted) this.form.show(error);
      return undefined;
    } finally {
      if (this.abort === abort) {
        this.busy = false;
        this.status = abort.signal.aborted ? strings.playground.stopped : "";
      }
    }
  }

  stop(): void {
    this.abort.abort();
  }

  /** Send a request and return its response. */
  send(call: Call): Promise<Response | undefined> {
    return this.start((signal) => sendCall(call, { signal }));
  }

  /** Run a request as a job: its place in the queue, its progress and previews are shown. Stopping cancels it. Returns the result. */
  job<T>(call: Call): Promise<T | undefined> {
    return this.start(async (signal) => {
      const job = await submitJob(call);
      const path = `/v1/jobs/${job.id}`;
      const cancel = (): void => void post(`${path}/cancel`).catch(() => {});
      signal.addEventListener("abort", cancel, { once: true });
      await this.follow(path, signal);
      signal.removeEventListener("abort", cancel);
      return get<T>(`${path}/result`, {}, signal);
    });
  }

  private follow(path: string, signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const poll = setInterval(() => void this.showPosition(path, signal), POLL_MS);
      void this.showPosition(path, signal);
      const end = follow(`${path}/events`, {
        onEvent: ({ event, data }) => {
          if (event === "job.started") this.status = strings.playground.running;
          else if (event === "job.progress") this.progress = JSON.parse(data) as Progress;
          else if (ENDS.has(event)) {
            finish();
            resolve();
          }
        },
        onError: (error) => (finish(), reject(error)),
      });
      const finish = (): void => {
        clearInterval(poll);
        end();
      };
      signal.addEventListener("abort", () => (finish(), reject(new DOMException("stopped", "AbortError"))), { once: true });
    });
  }

  private async showPosition(path: string, signal: AbortSignal): Promise<void> {
    try {
      const job = await get<Job>(path, {}, signal);
      if (job.status === "queued" && job.queue_position !== null && this.busy) this.status = strings.playground.queued(job.queue_position);
    } catch {
      // The events say how the job ends.
    }
  }
}

/** Submit requests as jobs that may wait, and say where they are found. */
export async function runLater(calls: Call[], form?: FormState): Promise<void> {
  for (const call of calls) {
    try {
      toasts.done(strings.playground.submitted((await submitJob(call, { later: true })).id));
    } catch (error) {
      if (form && error instanceof ApiError) form.show(error);
      else toasts.error(error);
    }
  }
}
