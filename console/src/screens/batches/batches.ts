/** The API's files and batches, and lines of files. */

import { ApiError, errorOf, send } from "../../lib/api";
import { session } from "../../lib/session.svelte";

export interface StoredFile {
  id: string;
  bytes: number;
  created_at: number;
  expires_at: number;
  filename: string;
  purpose: string;
}

export interface LineError {
  code: string | null;
  line: number | null;
  message: string;
  param: string | null;
}

export interface Batch {
  id: string;
  endpoint: string;
  model: string | null;
  errors: { data: LineError[] } | null;
  input_file_id: string;
  status: string;
  output_file_id: string | null;
  error_file_id: string | null;
  created_at: number;
  in_progress_at: number | null;
  expires_at: number;
  finalizing_at: number | null;
  completed_at: number | null;
  failed_at: number | null;
  expired_at: number | null;
  cancelled_at: number | null;
  request_counts: { total: number; completed: number; failed: number };
  metadata: Record<string, string> | null;
}

export interface List<T> {
  data: T[];
  has_more: boolean;
  last_id: string | null;
}

const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);
export const hasEnded = (batch: Batch): boolean => ENDED.has(batch.status);

export const endedAt = (batch: Batch): number | null => batch.completed_at ?? batch.failed_at ?? batch.expired_at ?? batch.cancelled_at;

/** Upload a file. `onProgress` gets the share that was sent; fetch cannot say it. Throws ApiError. */
export function upload(file: File, purpose: string, onProgress: (share: number) => void): Promise<StoredFile> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    request.setRequestHeader("x-csrf-token", session.csrfToken);
    request.responseType = "text";
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, "The gateway does not answer. Check the network and that Nexus runs."));
    request.onload = async () => {
      if (request.status < 400) return resolve(JSON.parse(request.responseText) as StoredFile);
      const error = await errorOf(new Response(request.responseText, { status: request.status }));
      if (error.status === 401) session.ended(error.message);
      reject(error);
    };
    const form = new FormData();
    form.set("purpose", purpose);
    form.set("file", file);
    request.send(form);
  });
}

/** Return the endpoint that the first line of a file names; empty: none. */
export async function endpointOf(file: File): Promise<string> {
  const [first = ""] = (await file.slice(0, 64 * 1024).text()).split("\n");
  return /"url"\s*:\s*"(\/v1\/[a-z/]+)"/.exec(first)?.[1] ?? "";
}

/** Read a file's JSON lines, at most `most` of them; the rest is not loaded. */
export async function readLines(fileId: string, most: number, signal: AbortSignal): Promise<{ lines: unknown[]; more: boolean }> {
  const stop = new AbortController();
  signal.addEventListener("abort", () => stop.abort());
  const response = await send(`/v1/files/${fileId}/content`, { signal: stop.signal, headers: { accept: "*/*" }, timeoutMs: 0 });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  const lines: unknown[] = [];
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = done ? "" : parts.pop()!;
    for (const part of parts) {
      if (!part.trim()) continue;
      if (lines.length === most) {
        stop.abort();
        return { lines, more: true };
      }
      lines.push(JSON.parse(part));
    }
    if (done) return { lines, more: false };
  }
}
