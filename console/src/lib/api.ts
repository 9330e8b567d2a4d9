/** The client of Nexus's public API: the session's cookie, the CSRF token, and errors as the API words them. */

import { session } from "./session.svelte";

const SAFE = new Set(["GET", "HEAD"]);
const TIMEOUT_MS = 60_000;

export type Query = Record<string, string | number | boolean | null | undefined>;

export interface RequestOptions {
  method?: string;
  query?: Query;
  /** Sent as JSON, unless it is a form or bytes. */
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal;
  /** Milliseconds until the request is given up; 0: never. */
  timeoutMs?: number;
}

/** What the API answered in place of a result. `param` names the wrong field. Status 0: no answer came. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly param: string | null = null,
    readonly requestId: string | null = null,
    /** Seconds after which a retry may help; null: unknown. */
    readonly retryAfter: number | null = null,
  ) {
    super(message);
    this.name = "ApiError";
  }

  get unreachable(): boolean {
    return this.status === 0;
  }
}

export function withQuery(path: string, query: Query = {}): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") search.set(name, String(value));
  }
  const text = search.toString();
  return text ? `${path}?${text}` : path;
}

/** Send a request and return its response. Throws ApiError for every status of 400 and above, and where no answer comes. */
export async function send(path: string, options: RequestOptions = {}): Promise<Response> {
  const method = options.method ?? "GET";
  const headers: Record<string, string> = { accept: "application/json", ...options.headers };
  let body: BodyInit | undefined;
  if (options.body instanceof FormData || options.body instanceof Blob || options.body instanceof URLSearchParams) {
    body = options.body;
  } else if (options.body !== undefined) {
    body = JSON.stringify(options.body);
    headers["content-type"] = "application/json";
  }
  if (!SAFE.has(method)) headers["x-csrf-token"] = session.csrfToken;
  const timeoutMs = options.timeoutMs ?? TIMEOUT_MS;
  const signals = [options.signal, timeoutMs ? AbortSignal.timeout(timeoutMs) : undefined].filter((s) => s !== undefined);
  let response: Response;
  try {
    response = await fetch(withQuery(path, options.query), {
      method,
      headers,
      body,
      signal: signals.length ? AbortSignal.any(signals) : undefined,
      credentials: "same-origin",
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(0, "The gateway does not answer. Check the network and that Nexus runs.");
  }
  if (response.ok) return response;
  const failure = await errorOf(response);
  if (failure.status === 401) session.ended(failure.message);
  throw failure;
}

/** Send a request and return the JSON of its answer. */
export async function request<T>(path: string, options: RequestOptions = {}): Promise<T> {
  const response = await send(path, options);
  return (response.status === 204 ? null : await response.json()) as T;
}

export const get = <T>(path: string, query?: Query, signal?: AbortSignal): Promise<T> => request<T>(path, { query, signal });
export const post = <T>(path: string, body?: unknown, query?: Query): Promise<T> =>
  request<T>(path, { method: "POST", body: body ?? {}, query });
export const put = <T>(path: string, body: unknown): Promise<T> => request<T>(path, { method: "PUT", body });
export const patch = <T>(path: string, body: unknown): Promise<T> => request<T>(path, { method: "PATCH", body });
export const del = <T>(path: string, query?: Query): Promise<T> => request<T>(path, { method: "DELETE", query });

/** Encode a part of a path: model names hold `/`, which the API takes as it is. */
export const modelPath = (model: string): string => model.split("/").map(encodeURIComponent).join("/");

export async function errorOf(response: Response): Promise<ApiError> {
  const requestId = response.headers.get("x-request-id");
  const wait = Number(response.headers.get("retry-after"));
  const retryAfter = wait > 0 ? wait : null;
  try {
    const { error } = (await response.json()) as { error: { message: string; code?: string | null; param?: string | null } };
    return new ApiError(response.status, error.message, error.code ?? null, error.param ?? null, requestId, retryAfter);
  } catch {
    return new ApiError(response.status, `The gateway answered with status ${response.status}.`, null, null, requestId, retryAfter);
  }
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
