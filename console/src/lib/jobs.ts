/** Jobs as the API returns them, and calls that change many. */

import type { Tone } from "../kit/Badge.svelte";
import { post } from "./api";

export type JobStatus = "queued" | "in_progress" | "completed" | "failed" | "cancelled" | "expired";

export interface JobAttempt {
  run: number;
  number: number;
  worker: string;
  started_at: number;
  first_output_at: number | null;
  ended_at: number | null;
  end: string | null;
  code: string | null;
}

export interface Job {
  id: string;
  team?: string;
  endpoint: string;
  capability: string;
  model: string;
  service_tier: string;
  status: JobStatus;
  created_at: number;
  queued_at: number;
  started_at: number | null;
  finished_at: number | null;
  run: number;
  attempts: number;
  queue_position: number | null;
  eta_seconds: number | null;
  progress: number | null;
  worker: string | null;
  key: string | null;
  request_id: string | null;
  usage: Record<string, unknown> | null;
  error?: { message: string; code: string | null; type: string } | null;
  error_code?: string | null;
  metadata?: Record<string, string>;
  attempts_detail?: JobAttempt[];
  webhook?: { url: string; state: string; deliveries: { at: number; attempt: number; status: number | null; error: string | null }[] };
  batch?: string;
}

export interface BulkResult {
  matched: number;
  succeeded: number;
  failed: number;
  errors: { id: string; code: string; message: string }[];
  has_more: boolean;
  next_after?: string | null;
  next_before?: number | null;
}

export const STATUSES: JobStatus[] = ["queued", "in_progress", "completed", "failed", "cancelled", "expired"];
export const STATUS_TONES: Record<JobStatus, Tone> = {
  queued: "neutral",
  in_progress: "info",
  completed: "good",
  failed: "bad",
  cancelled: "warn",
  expired: "warn",
};
export const ENDED: ReadonlySet<string> = new Set<JobStatus>(["completed", "failed", "cancelled", "expired"]);

/** Repeat a call until nothing is left, and report what was done after each. */
export async function changeAll(path: string, body: Record<string, unknown>, onProgress: (sum: BulkResult) => void): Promise<BulkResult> {
  const sum: BulkResult = { matched: 0, succeeded: 0, failed: 0, errors: [], has_more: true };
  let cursor: Record<string, unknown> = {};
  while (sum.has_more) {
    const part: BulkResult = await post<BulkResult>(path, { ...body, ...cursor });
    sum.matched += part.matched;
    sum.succeeded += part.succeeded;
    sum.failed += part.failed;
    sum.errors = [...sum.errors, ...part.errors].slice(0, 100);
    sum.has_more = part.has_more;
    cursor = part.next_after ? { after: part.next_after } : { before: part.next_before };
    onProgress({ ...sum });
  }
  return sum;
}
